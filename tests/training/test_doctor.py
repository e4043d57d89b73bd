"""The doctor: what it says of a run that can begin, and of those that can not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from overture.config.load import load_config
from overture.data.schema import read_ledger
from overture.training import doctor
from overture.training.doctor import (
    GIB,
    _gathered,
    _memory,
    _shards,
    _step,
    _time,
    _weights,
    examine,
)
from overture.training.rehearsal import Rehearsal, rehearse

PARTS = {"weights": 2 * GIB, "gradients": GIB, "optimizer": 2 * GIB,
         "activations": 16 * GIB, "logits": 0, "workspace": GIB}  # fmt: skip
FOUND = Rehearsal(
    described=[], attention="", rows=16, samples=1000, tokens=50.0, seconds=3.5, update=0.5,
    loss=1.0,
    parts=PARTS, loading=GIB, per_row=GIB, foretold=22 * GIB, whole=False, without=[],
    checkpoint=GIB,
)  # fmt: skip


@pytest.fixture
def config(tiny_yaml, tmp_path, monkeypatch):
    def load(*overrides):
        path = tmp_path / "tiny.yaml"
        path.write_text(tiny_yaml)
        return load_config([str(path), *overrides], ("instruct", "causal_lm"))

    monkeypatch.chdir(tmp_path)
    return load


def test_a_run_that_can_begin_is_told_so(run_door, smoke, tmp_path):
    done = run_door("src/check_setup.py", "yamls/smoke/finetune.yaml", f"run_folder={tmp_path}/r")
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "this run can begin"
    table = {line[8:21].strip(): line[:8].strip() for line in lines[-13:-1]}
    assert table == dict.fromkeys(
        ("config", "versions", "hub", "run folder", "data, train", "data, test", "model",
         "attention", "step", "memory", "time", "disk"), "ok",
    ) | {"versions": table["versions"]}  # fmt: skip
    assert "16 steps" in done.stdout and "[[" in done.stdout
    assert "no token sees a later one or another document\n" in done.stdout
    assert not (tmp_path / "r").exists()


def test_a_model_too_large_is_stopped_before_it_is_made(run_door, smoke):
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
             "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip
    done = run_door("src/check_setup.py", "yamls/smoke/pretrain.yaml",
                    f"model.config={json.dumps(shape)}")  # fmt: skip
    assert done.returncode == 2, done.stderr + done.stdout
    line = next(x for x in done.stdout.splitlines() if x.startswith("STOP"))  # another: the disk
    # 80 layers of attention (q and o whole, k and v an eighth), three products, and two norms;
    # 16 bytes each. The vocabulary has 1,024 pieces at most.
    layers = 80 * (8192 * 8192 * 2.25 + 3 * 8192 * 28672 + 2 * 8192)
    assert float(line.split("take ")[1].split(" ")[0]) == pytest.approx(
        layers * 16 / GIB, rel=0.001
    )
    assert done.stdout.splitlines()[-1].endswith("of these must be mended first")


@pytest.mark.parametrize(("bits", "size"), [(4, 0.5), (8, 1)])
def test_quantised_weights_take_half_a_byte_or_one(config, bits, size):
    shape = {"hidden_size": 4096, "intermediate_size": 4096, "num_hidden_layers": 10,
             "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
    options = (f"model.config={json.dumps(shape)}", "model.dtype=bfloat16", "trainable=lora")
    asked = config(*options)
    setattr(asked.model, f"load_in_{bits}bit", True)
    *_, found = _weights(asked, 0)
    said = float(found.text.split("take ")[1].split(" ")[0])
    assert said == pytest.approx(10 * 7 * 4096**2 * size / GIB, abs=0.06)  # tables: 0.02 GiB


def test_what_is_wrong_with_the_data_is_a_stop(config, tmp_path):
    findings = list(examine(config(f"data_local={tmp_path}/none")))
    assert [f.verdict for f in findings][-1] == "stop"
    assert f"{tmp_path}/none" in findings[-1].text


def test_a_disk_too_small_for_the_checkpoints_is_a_stop(config, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    *_, last = examine(config())
    assert (last.verdict, "checkpoints take" in last.text) == ("stop", True)


def test_memory_that_is_there_is_fine_and_remedies_are_named_where_it_is_not(config):
    plain = config("global_train_batch_size=16", "device_train_microbatch_size=16")
    assert _memory(plain, FOUND, 45 * GIB).verdict == "ok"
    assert _memory(plain, FOUND._replace(whole=True), 25 * GIB).verdict == "ok"
    assert _memory(plain, FOUND, 43 * GIB).verdict == "warning"
    found = _memory(plain, FOUND, 12 * GIB)
    assert found.verdict == "stop"
    assert found.text.startswith("16 rows: foretold from fewer: 22.00 GiB, 12.0 are there; ")
    # Of 12 GiB nine tenths are taken; 6 are not of rows; 4 rows fit, and divide 16.
    assert "device_train_microbatch_size=4, at no other cost" in found.text
    assert "trainable=lora" not in found.text  # over random weights
    plain.model.pretrained = True
    assert "trainable=lora, about 3.0 GiB less" in _memory(plain, FOUND, 12 * GIB).text
    assert "device_train_microbatch_size" not in _memory(plain, FOUND, 6 * GIB).text
    auto = config("global_train_batch_size=16", "device_train_microbatch_size=auto")
    assert _memory(auto, FOUND, 12 * GIB).verdict == "ok"
    assert "auto will take 4 or so" in _memory(auto, FOUND, 12 * GIB).text
    lora = config("trainable=lora", "model.dtype=float32")
    assert "model.dtype=bfloat16, 1.0 GiB less" in _memory(lora, FOUND, 12 * GIB).text


@pytest.mark.parametrize(
    ("asked", "steps"),
    [("100ba", 100), ("2ep", 124), ("1600sp", 100), ("1601sp", 101), ("80000tok", 100)],
)
def test_time_is_that_of_all_steps(config, asked, steps):
    options = ("global_train_batch_size=16", f"max_duration={asked}")
    text = _time(config(*options), FOUND).text
    assert text.startswith(f"{steps} steps, {steps * 16 * 50:,} tokens, 200 a second")
    assert f"{steps * 4 / 60:.1f} minutes" in text
    # Of four microbatches a step has one update.
    seconds = steps * (4 * 3.5 + 0.5)
    text = _time(config(*options), FOUND._replace(rows=4)).text
    assert f"{seconds / 3600:.1f} hours" in text or f"{seconds / 60:.1f} minutes" in text
    assert f"{steps * 16 * 50 / seconds:,.0f} a second" in text


@pytest.mark.parametrize("options", [(), ("trainable=lora", "model.dtype=float32")])
def test_of_a_model_that_is_too_large_steps_and_disk_are_told(config, monkeypatch, options):
    monkeypatch.setattr(doctor, "memory_there", lambda: 1000)
    asked = config(*options, "max_duration=2ep", "global_train_batch_size=4")
    found = {finding.part: finding for finding in examine(asked)}
    assert found["memory"].verdict == "stop"
    samples = read_ledger(Path(asked.data_local) / "train")["samples"]
    assert found["time"].text.startswith(f"{2 * (samples // 4):,} steps, ")
    whole = rehearse(asked, 1 << 40)
    each = "adapters alone" if options else f"of {whole.checkpoint / GIB:.2f} GiB each"
    assert each in found["disk"].text
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    if not options:
        *_, last = examine(asked)
        assert (last.verdict, "checkpoints take" in last.text) == ("stop", True)


def test_a_tensor_without_a_gradient_is_named():
    found = _step(FOUND._replace(without=["a.weight", "b.weight"]))
    assert found.verdict == "stop"
    assert "no gradient reaches a.weight, b.weight, or none that is finite;" in found.text
    assert _step(FOUND._replace(loss=float("nan"))).text.startswith("the loss is nan")


def test_what_does_not_fit_at_all_is_told_what_could(config):
    lower = "device_train_microbatch_size=1"
    ways = f"{lower} or model.activation_checkpointing=true or a lower max_seq_len"
    assert doctor.too_large(config()) == f"it does not fit; try {ways}"
    least = config(lower, "model.activation_checkpointing=true")
    assert doctor.too_large(least) == "it does not fit; try a lower max_seq_len"


def test_ddp_keeps_gradients_a_second_time(config, monkeypatch):
    plain, found = config("global_train_batch_size=16"), FOUND._replace(whole=True)
    assert _memory(plain, found, 25 * GIB).verdict == "ok"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert "  more on several ranks      1.00 GiB" in _memory(plain, found, 25 * GIB).more
    assert _memory(plain, found, 25 * GIB).verdict == "ok"  # of 16 rows each has two
    wide = config("global_train_batch_size=128", "device_train_microbatch_size=16")
    assert _memory(wide, found, 25 * GIB).verdict == "warning"
    # Six GiB are not of rows, and one is DDP's; of 15 rows each that divide them three fit.
    odd = config("global_train_batch_size=120", "device_train_microbatch_size=15")
    assert "microbatch_size=3, at no" in _memory(odd, found, 12 * GIB).text
    sharded = config("fsdp_config={}", "global_train_batch_size=16")
    assert _memory(sharded, found, 25 * GIB).verdict == "ok"


def test_what_a_model_holds_is_counted(config, monkeypatch):
    monkeypatch.setattr("overture.training.rehearsal.AT_ONCE", 1e9)
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    options = ("global_train_batch_size=24", "device_train_microbatch_size=24",
               f"model.config={json.dumps(shape)}")  # fmt: skip
    found = rehearse(config(*options), 1 << 40)
    assert (found.rows, found.whole, found.without) == (24, True, [])
    # Of Llama: four products of attention, three of the MLP, two norms; a norm; two tables.
    count = 4 * (4 * 256**2 + 3 * 256 * 1024 + 2 * 256) + 256
    assert found.parts["gradients"] > 4 * count
    assert found.parts["gradients"] == pytest.approx(4 * count + 2 * 4 * 1024 * 256, rel=0.1)
    # Adam keeps two numbers of each, and how many steps it made.
    assert found.parts["optimizer"] == pytest.approx(2 * found.parts["gradients"], rel=1e-3)
    assert found.parts["weights"] == pytest.approx(found.parts["gradients"], rel=1e-3)
    assert found.checkpoint == pytest.approx(3 * found.parts["weights"], rel=0.01)
    lora = rehearse(config(*options, "trainable=lora", "algorithms.ema.half_life=2ba"), 1 << 40)
    assert lora.checkpoint < 0.4 * lora.parts["weights"]  # adapters alone are saved
    assert lora.parts["moving average"] == lora.parts["gradients"] > 0
    monkeypatch.setattr("overture.training.rehearsal.AT_ONCE", 0.0)
    few = rehearse(config(*options), 1 << 40)
    assert (few.whole, few.tokens) == (False, found.tokens)


def test_lists_within_a_layer_are_no_layers(config):
    t5 = T5Config(d_model=64, d_ff=128, num_layers=3, num_heads=4, vocab_size=500)
    network = T5ForConditionalGeneration(t5)
    sizes = [sum(p.numel() for p in b.parameters()) for b in network.decoder.block]
    encoder = sum(p.numel() for b in network.encoder.block for p in b.parameters())
    whole = sum(p.numel() for p in network.parameters())
    expected = 4 * (2 * max(sizes) + whole - sum(sizes) - encoder)
    assert _gathered(config("fsdp_config={}"), network) == expected > 0


def test_a_finished_run_is_a_stop(config, tmp_path):
    asked = config()
    folder = tmp_path / asked.run_folder
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "completed"}')
    (found,) = [finding for finding in examine(asked) if finding.part == "run folder"]
    assert (found.verdict, "is finished (completed); choose" in found.text) == ("stop", True)
    (folder / "result.json").unlink()
    (folder / "config.yaml").touch()
    found = doctor._run_folder(asked)
    assert (found.verdict, "is no folder of a run" in found.text) == ("stop", True)


def test_a_run_that_would_go_on_is_told_or_stopped(config, broken, tmp_path):
    broken("tiny", "save_interval=2ba", at=(3,), finish=False)
    asked = load_config(["runs/tiny/config.yaml"], ("instruct",))
    found = doctor._run_folder(asked)
    assert (found.verdict, found.text) == ("ok", "the run goes on from runs/tiny/checkpoints/ba2")
    asked.seed += 1
    found = doctor._run_folder(asked)
    assert (found.verdict, "with another config (seed changed)" in found.text) == ("stop", True)
    # One whose last checkpoint is broken is told of, and left as it is.
    (tmp_path / "runs/tiny/checkpoints/ba2/state.pt").write_bytes(b"")
    found = doctor._run_folder(asked)
    assert (found.verdict, "no checkpoint there is whole" in found.text) == ("stop", True)
    assert (tmp_path / "runs/tiny/checkpoints/ba2").exists()


def test_another_runs_weights_are_looked_at(config, run, smoke):
    _, folder = run("max_duration=1ba", "run_name=first")
    *_, last = examine(config(f"load_path={folder}"))
    assert (last.part, last.verdict) == ("disk", "ok")
    *_, last = examine(config(f"load_path={folder}", "model.config.num_hidden_layers=1"))
    assert (last.verdict, "load_path: " in last.text) == ("stop", True), last
    *_, last = examine(config("generation.max_new_tokens=100000"))
    assert (last.verdict, "leave no room for a prompt" in last.text) == ("stop", True), last


def test_what_loading_takes_is_not_laid_to_rows(config):
    plain = config("global_train_batch_size=16", "device_train_microbatch_size=16")
    found = _memory(plain, FOUND._replace(loading=30 * GIB), 31 * GIB)
    assert found.verdict == "warning"
    start = "loading the model, more than 16 rows after it, takes 30.00 GiB, 31.0 are there; or "
    assert found.text == start + "a larger device"
    auto = config("global_train_batch_size=16", "device_train_microbatch_size=auto")
    assert _memory(auto, FOUND._replace(loading=30 * GIB), 31 * GIB).verdict == "warning"


def test_data_that_are_fetched_are_shown_when_they_are_here(config, smoke):
    asked = config(f"data_remote={smoke}/instruct", "data_local=cache")
    found = {finding.part: finding for finding in examine(asked)}
    assert {finding.verdict for finding in found.values()} <= {"ok", "warning"}, found
    train, test = found["data, train"], found["data, test"]
    assert "shards are hashed as they arrive" in train.text and "shards are hashed" in test.text
    assert train.more and not test.more


def test_shards_are_counted_and_how_many_ranks_they_need(config):
    shape = {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    }  # fmt: skip
    big = config("fsdp_config={}", "precision=amp_bf16", f"model.config={json.dumps(shape)}")
    # 8,030,261,248 parameters of 16 bytes, as the yaml of that name says.
    (found,) = _weights(big, 80 * GIB)
    assert found.verdict == "warning"
    assert "59.8 on 2, 29.9 on 4, 15.0 on 8" in found.text
    # Gradients of what belongs to no layer, in bfloat16, and the copy of float32 that is added up.
    assert "besides 5.9; at least 4 ranks like this device of 80.0 GiB" in found.text
    assert found.text.endswith("what activations take is not known")
    (found,) = _weights(big, 3 * GIB)
    assert (found.verdict, found.text.endswith("too large")) == ("stop", True)
    (found,) = _weights(big, 200 * GIB)
    assert found.verdict == "ok"


def test_a_step_that_fits_in_shards_alone_is_no_stop(config):
    sharded = config("fsdp_config={}", "global_train_batch_size=16")
    # Of 22 GiB 5 are divided; 17 are not, and 1 is gathered: 18 + 5 / 2.
    assert _memory(sharded, FOUND, 21 * GIB).verdict == "stop"
    found = _memory(sharded, FOUND, 23 * GIB, besides=GIB)
    assert (found.verdict, found.text.split("; ")[-1]) == (
        "ok",
        "in shards 20.50 on each of 2 ranks",
    )
    assert _memory(sharded, FOUND, 19 * GIB, besides=GIB).verdict == "stop"


def test_shards_in_the_hosts_memory_take_none_of_the_gpu(config, monkeypatch):
    sharded = config("fsdp_config.cpu_offload=true", "global_train_batch_size=16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not doctor._offloaded(sharded)  # on a CPU it is the same memory
    monkeypatch.setattr(doctor, "_offloaded", lambda config: True)
    monkeypatch.setattr(doctor, "host_memory", lambda: 100 * GIB)
    found = _memory(sharded, FOUND, 21 * GIB, besides=GIB)
    assert found.text.endswith("in shards 18.00 on each of 1 ranks")
    layer = torch.nn.Linear(96, 100, bias=False, device="meta")  # 38,400 bytes, pinned 65,536
    assert doctor._in_hosts(sharded, layer) == 2 * 65_536 + 2 * 38_400 + 3 * 38_400
    parts = config("fsdp_config={cpu_offload: true, state_dict_type: sharded}")
    assert doctor._in_hosts(parts, layer) == 2 * 65_536 + 2 * 38_400
    text = "weights in the hosts' memory: {} GiB at once, of which this host has 100.0 free"
    fits = _shards("weights", 6 * GIB, 60 * GIB, 80 * GIB, in_hosts=60 * GIB)
    assert fits.text.startswith(text.format("60.0") + "; 6.0 on each GPU; at least 1 ranks")
    many = _shards("weights", 6 * GIB, 60 * GIB, 80 * GIB, in_hosts=105 * GIB)
    assert (fits.verdict, many.verdict) == ("ok", "warning")
    assert many.text.endswith(": it takes several hosts, or a larger one")
