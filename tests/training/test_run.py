"""The recipe for real: Composer's Trainer on real shards, its run folder, its exit codes."""

import fcntl
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from composer.core import Callback
from safetensors.torch import load_file
from streaming import StreamingDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from overture.callbacks import run_log
from overture.config.load import load_config
from overture.errors import ConfigError, DataError
from overture.training import run as recipe
from overture.training.network import choose_device
from overture.training.run_folder import explain
from runs import curve, records, result


def test_completed_run_leaves_everything_another_tool_needs(run, smoke):
    code, folder = run("generation.num_prompts=6", "generation.max_new_tokens=4")
    assert code == 0
    outcome = result(folder)
    assert outcome["status"] == "completed"
    assert outcome["steps"] == 8
    assert outcome["seed"] == 17
    steps, evals = records(folder, "train"), records(folder, "eval")
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["step"] for r in evals] == [0, 4, 8]
    assert outcome["eval_cross_entropy"] == evals[-1]["cross_entropy"] < evals[0]["cross_entropy"]
    assert outcome["eval_cross_entropy_before"] == evals[0]["cross_entropy"]
    assert outcome["eval_perplexity"] == pytest.approx(math.exp(evals[-1]["cross_entropy"]))
    assert outcome["tokens_seen"] == steps[-1]["tokens"] <= 8 * 4 * 128
    assert 0 < outcome["label_tokens_seen"] == steps[-1]["label_tokens"] < outcome["tokens_seen"]
    assert outcome["tokens_per_second"] > outcome["label_tokens_per_second"] > 0
    assert 0 < steps[-1]["padding_share"] < 0.2
    assert outcome["metrics"]["exact_match_prompts"] == 6
    answers = [json.loads(x) for x in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    assert all(a["prompt"].endswith("### Response:\n") for a in answers)
    assert (folder / "report.html").is_file()
    assert (folder / "hf" / "model.safetensors").is_file()
    known = json.loads((folder / "environment.json").read_text())
    assert known["command"].startswith("python")
    ledger = json.loads((smoke / "instruct" / "train" / "dataset.json").read_text())
    kept = {"rows": ledger["rows"]["kept"], "tokens": ledger["tokens"]["total"]}
    assert kept.items() < known["data"][0].items()
    assert not list(folder.rglob("*.bin"))
    # What was saved is what was evaluated, read back by plain transformers and plain torch.
    samples = _losses(folder / "hf", smoke / "instruct")
    every = torch.cat([losses for _, losses in samples])
    assert every.mean().item() == pytest.approx(outcome["eval_cross_entropy"], abs=1e-4)
    # The samples of the highest loss, token by token.
    worst = sorted(samples, key=lambda sample: -sample[1].mean().item())[:8]
    shown = [json.loads(x) for x in (folder / "token_losses.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    for row, (ids, losses) in zip(shown, worst, strict=True):
        assert row["of"] == len(samples)
        assert row["mean"] == pytest.approx(losses.mean().item(), abs=1e-4)
        found = [loss for _, loss in row["pieces"] if loss is not None]
        assert sum(found) == pytest.approx(losses.sum().item(), rel=1e-4)
        assert "".join(text for text, _ in row["pieces"]) == tokenizer.decode(ids)
        learned = "".join(text for text, loss in row["pieces"] if loss is not None)
        assert tokenizer.decode(ids).endswith(learned) and "### Response" not in learned


def _losses(model_folder: Path, data: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the ids of each document of the test split, and the losses of its labels."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    rows = StreamingDataset(local=str(data), split="test", batch_size=1)
    found = []
    for number in range(rows.num_samples):
        row, start = rows[number], 0
        for end in row["document_ends"].tolist():
            ids = torch.from_numpy(row["input_ids"][start:end].astype("int64"))[None]
            learned = torch.from_numpy(row["loss_mask"][start + 1 : end].astype(bool))
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            found.append((ids[0], losses[learned]))
            start = end
    return found


def test_loss_does_not_depend_on_the_microbatch(run):
    curves = []
    for size in (1, 2, 4):
        _, folder = run(f"device_train_microbatch_size={size}", f"run_name=micro{size}")
        curves.append([r["loss"] for r in records(folder, "train")])
        curves[-1] += [r["cross_entropy"] for r in records(folder, "eval")]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


@pytest.mark.slow  # a minute of compilation
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_learns_and_saves_the_same(run):
    curves, weights = [], []
    for on in ("false", "true"):
        _, folder = run(f"compile={on}", f"run_name=compile-{on}", "eval_interval=8ba")
        curves.append(curve(folder))
        weights.append(load_file(folder / "hf" / "model.safetensors"))
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert weights[1].keys() == weights[0].keys()
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=0)


def test_steps_are_logged_in_batches_and_none_before_a_checkpoint_waits(run, monkeypatch):
    log, seen, build = Path("runs/batches/metrics.jsonl"), {}, recipe.build_callbacks

    class Look(Callback):
        def batch_start(self, state, logger):
            text = log.read_text() if log.exists() else ""
            seen[state.timestamp.batch.value] = text.count('"train"')

    monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), Look()])
    monkeypatch.setattr(run_log, "SECONDS", math.inf)
    options = ("save_interval=3ba", "eval_interval=5ba")
    _, folder = run("run_name=batches", "max_duration=7ba", "eval_first=false", *options)
    assert seen == {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 5, 6: 6}
    assert [r["step"] for r in records(folder, "train")] == list(range(1, 8))


def test_target_stops_the_run_at_the_first_evaluation_below(run):
    code, folder = run("callbacks.loss_target.cross_entropy=6.5", "max_duration=40ba")
    outcome, evals = result(folder), records(folder, "eval")
    assert code == 0
    assert outcome["status"] == "target_reached"
    assert outcome["steps"] == evals[-1]["step"] < 40
    assert evals[-1]["cross_entropy"] <= 6.5 < evals[-2]["cross_entropy"]
    assert [e["step"] for e in evals] == sorted({e["step"] for e in evals})  # none runs twice
    # The clock stops when the target is seen, within the evaluation that saw it.
    assert outcome["time_to_train_seconds"] == pytest.approx(evals[-1]["seconds"], abs=0.1)


def test_target_that_the_base_meets_trains_nothing(run):
    code, folder = run("callbacks.loss_target.cross_entropy=50")
    assert code == 0
    assert result(folder)["status"] == "target_reached"
    assert result(folder)["steps"] == 0


def test_missed_target_exits_3_and_says_by_how_much(run, capsys):
    code, folder = run("callbacks.loss_target.cross_entropy=0.01")
    outcome = result(folder)
    assert code == 3
    assert outcome["status"] == "target_missed"
    assert outcome["time_to_train_seconds"] is None
    said = capsys.readouterr().out
    assert f"eval cross-entropy {outcome['eval_cross_entropy']:.4f}, 0.01 was asked for" in said


def test_lora_saves_adapters_only(run):
    run("run_name=base", "max_duration=1ba")
    code, folder = run(
        "run_name=lora", "trainable=lora", "lora.r=4", "model.name=runs/base",
        "model.pretrained=true", "model.config={}", "tokenizer_name=null",
    )  # fmt: skip
    assert code == 0
    assert (folder / "hf" / "adapter_model.safetensors").is_file()
    assert not (folder / "hf" / "model.safetensors").exists()
    saved = load_file(folder / "hf" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    checkpoint = next((folder / "checkpoints").glob("ba*")) / "state.pt"
    state = torch.load(checkpoint, weights_only=False)["state"]["model"]
    assert state
    assert all("lora_" in name for name in state)


def test_finished_run_is_refused_and_changed_config_too(run):
    run("max_duration=1ba", "run_name=done")
    with pytest.raises(ConfigError, match=r"done is finished \(completed\); choose another"):
        run("max_duration=1ba", "run_name=done")
    Path("runs/done/result.json").unlink()
    with pytest.raises(ConfigError, match=r"begun with another config \(optimizer changed\)"):
        run("max_duration=1ba", "run_name=done", "optimizer.lr=1")
    words = r"\(model changed, of a llama of \{.*'hidden_size': 32.* and not a .*'hidden_size': 64"
    with pytest.raises(ConfigError, match=words):
        run("max_duration=1ba", "run_name=done", "model.config.hidden_size=64")


def test_shards_of_another_tokenizer_task_or_length_are_refused(run, smoke, tmp_path):
    other = tmp_path / "tokenizer"
    shutil.copytree(smoke / "tokenizer", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces["Ġthe"], pieces["Ġto"] = pieces["Ġto"], pieces["Ġthe"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="another tokenizer than"):
        run(f"tokenizer_name={other}", "run_name=a")
    with pytest.raises(ConfigError, match=r"converted with --task text"):
        run("run_name=b", data=smoke / "text")
    with pytest.raises(ConfigError, match=r"max_seq_len: 64 is shorter than the rows"):
        run("run_name=c", "max_seq_len=64")


def test_more_samples_per_batch_than_there_are(run):
    with pytest.raises(ConfigError, match=r"100000 samples per batch, but .* holds only"):
        run("global_train_batch_size=100000", "device_train_microbatch_size=100000")


def test_missing_shard_ends_the_run_instead_of_the_epoch(run, smoke, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(smoke / "instruct", data)
    next((data / "train").glob("shard*")).unlink()
    with pytest.raises((DataError, ValueError, FileNotFoundError, RuntimeError)):
        run("run_name=broken", data=data)
    assert result(Path("runs/broken"))["status"] == "failed"


def test_cpu_takes_no_fp16(run):
    with pytest.raises(ConfigError, match="amp_fp16 needs a CUDA device"):
        run("precision=amp_fp16")


def test_a_rank_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"rank 2 of this node has no GPU, .* composer -n 2$"):
        choose_device(None)


def test_a_run_whose_checkpoints_lie_elsewhere_is_not_begun_anew(run):
    place = Path("runs/elsewhere")
    place.mkdir(parents=True)
    said = "stopped as asked, saved at step 4; the same command goes on"
    (place / "result.json").write_text(json.dumps({"status": "preempted", "error": said}))
    with pytest.raises(DataError, match=r"saved at step 4; .*elsewhere/checkpoints has no checkp"):
        run("run_name=elsewhere")


def test_other_data_on_another_rank_are_told(tiny_yaml, tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml)
    config = load_config([str(tmp_path / "tiny.yaml")], ("instruct",))
    assert recipe._same_data(config).keys() == {"train", "test"}
    monkeypatch.setattr(recipe.dist, "all_gather_object", lambda one: [one, {**one, "test": "0"}])
    with pytest.raises(DataError, match=r"test: is another dataset on rank 1 than on rank 0"):
        recipe._same_data(config)


def test_what_a_gpu_says_is_told_as_what_it_is(tiny_yaml, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml)
    config = load_config([str(tmp_path / "tiny.yaml")], ("instruct",))
    covered = ValueError("Encountered non-addressable cuda error while using auto microbatching.")
    covered.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for error in (covered, RuntimeError("CUDA out of memory or excessive memory allocation")):
        assert "in an evaluation a lower device_eval_batch_size" in str(explain(error, config))
    lost = RuntimeError("NCCL communicator was aborted on rank 1")
    assert "another rank ended" in str(explain(lost, config))
    own = RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, unhandled system error")
    assert explain(own, config) is own


def test_remote_shards_are_streamed_into_the_cache(run, smoke, tmp_path):
    cache = tmp_path / "cache"
    code, folder = run(f"data_remote={smoke / 'instruct'}", "run_name=remote", data=cache)
    assert code == 0
    assert list((cache / "train").glob("shard*"))
    _, local = run("run_name=local")
    assert records(folder, "eval")[-1]["cross_entropy"] == pytest.approx(
        records(local, "eval")[-1]["cross_entropy"], abs=1e-6
    )


def test_remote_that_is_not_there(run, tmp_path):
    with pytest.raises(ConfigError, match=r"data_remote: .*dataset\.json cannot be read"):
        run(f"data_remote={tmp_path / 'nowhere'}", data=tmp_path / "cache")


def test_late_mistake_does_not_lock_the_run_name(run):
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        run("run_name=late", "trainable=lora", "lora.target_modules=[nope]")
    assert not Path("runs/late").exists()
    code, _ = run("run_name=late", "max_duration=1ba")
    assert code == 0


def test_load_path_brings_weights_but_no_clock_and_no_outcome(run):
    _, first = run("run_name=first", "callbacks.loss_target.cross_entropy=6.9")
    assert result(first)["status"] == "target_reached"
    options = [f"load_path={first}", "load_weights_only=true", "max_duration=1ba"]
    code, second = run("run_name=second", "callbacks.loss_target.cross_entropy=0.01", *options)
    assert code == 3
    outcome = result(second)
    assert outcome["tokens_seen"] <= 4 * 128
    start = result(first)["eval_cross_entropy"]
    assert outcome["eval_cross_entropy_before"] == pytest.approx(start, abs=1e-5)


def test_run_that_died_after_its_last_step_is_finished_by_the_same_command(run):
    _, folder = run("run_name=late", "save_interval=4ba")
    before = result(folder)
    for name in ("result.json", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "hf")
    code, _ = run("run_name=late", "save_interval=4ba")
    after = result(folder)
    assert code == 0
    for key in ("status", "steps", "tokens_seen", "eval_cross_entropy_before"):
        assert after[key] == before[key]
    assert after["eval_cross_entropy"] == pytest.approx(before["eval_cross_entropy"], abs=1e-6)
    assert (folder / "hf" / "model.safetensors").is_file()


def test_more_tokens_than_positions(run):
    with pytest.raises(ConfigError, match="max_seq_len: 128, but llama has 64 positions"):
        run("model.config.max_position_embeddings=64")


def test_two_processes_do_not_train_into_one_folder(run, tmp_path):
    folder = tmp_path / "runs" / "shared"
    folder.mkdir(parents=True)
    other = (folder / ".lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match=r"run_folder: another process trains into runs/shared"):
        run("run_name=shared", "max_duration=1ba")
    other.close()
    assert run("run_name=shared", "max_duration=1ba")[0] == 0
