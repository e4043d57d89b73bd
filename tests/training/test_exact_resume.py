"""Interrupted and resumed equals uninterrupted, bit for bit; what has changed is refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from outages import RESUMED
from overture.errors import ConfigError, DataError
from overture.training import run as recipe
from overture.training.resume import changed_keys
from runs import assert_same, curve, final_state, records, result


def steps_per_epoch(smoke: Path) -> int:
    index = json.loads((smoke / "instruct" / "train" / "index.json").read_text())
    return sum(shard["samples"] for shard in index["shards"]) // 24


def test_bit_for_bit_wherever_it_breaks_off(broken, smoke):
    epoch = steps_per_epoch(smoke)
    assert 3 <= epoch <= 7  # so that 16 steps reach into the third epoch
    whole = broken("whole", "save_interval=16ba")
    assert len(curve(whole)) == 16 + 4
    # Within an epoch, at its end, at the next one's start, twice, with and without workers.
    for number, (at, save, workers) in enumerate(
        [
            ((3,), "2ba", 0),
            ((epoch + 1,), f"{epoch}ba", 2),  # saved at the last batch of an epoch
            ((epoch + 1,), "1ep", 0),  # saved after its end
            ((2 * epoch + 1,), "1ep", 2),
            ((2, epoch, 2 * epoch + 2), "1ba", 0),
        ]
    ):
        parts = broken(
            f"parts{number}", f"save_interval={save}", f"train_loader.num_workers={workers}", at=at
        )
        assert_same(whole, parts)
    # Saved before the evaluation that ends an epoch: it comes on the way on, once.
    options = ("eval_interval=1ep", "max_duration=2ep")
    whole = broken("whole-epochs", *options, "save_interval=16ba")
    parts = broken("parts-epochs", *options, f"save_interval={epoch}ba", at=(epoch + 1,))
    assert_same(whole, parts)


def test_weights_of_full_training_too_and_what_the_log_counts(broken):
    options = ("trainable=all", "lora=null", "model.dtype=float32", "max_duration=5ba",
               "model.config.attention_dropout=0.1")  # fmt: skip
    whole = broken("whole", *options)
    parts = broken("parts", *options, "save_interval=2ba", at=(3, 5))
    assert_same(whole, parts)
    for key in ("steps", "tokens_seen", "label_tokens_seen", "eval_cross_entropy"):
        assert result(parts)[key] == result(whole)[key]


def mixed(*places: Path) -> tuple[str, ...]:
    """Overrides that mix the train splits of some folders and evaluate on the last one's test."""
    streams = [
        f"train_loader.streams.s{number}={{data_local: {place}, proportion: {number + 1}}}"
        for number, place in enumerate(places)
    ]
    held_out = f"eval_loader.streams.held={{data_local: {places[-1]}, split: test}}"
    return ("data_local=null", *streams, held_out, "eval_loader.dataset.split=train")


def test_bit_for_bit_over_streams_average_and_growing_lengths(broken, smoke, tmp_path):
    shutil.copytree(smoke / "text" / "train", tmp_path / "other" / "train")
    options = (
        *mixed(tmp_path / "other", smoke / "text"), "task=causal_lm",
        "algorithms.ema.half_life=3ba",
        "algorithms.seq_length_warmup={duration: 0.8, min_seq_length: 8, step_size: 4}",
        "max_duration=11ba",
    )  # fmt: skip
    more = {"tasks": ("causal_lm",)}
    whole = broken("whole", *options, **more)
    # Eight steps make an epoch: within the first, and in the second, which draws other rows.
    parts = broken("parts", *options, "save_interval=2ba", at=(3, 9), **more)
    assert_same(whole, parts)


def test_another_stream_under_the_same_name_is_refused(broken, run, smoke, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(smoke / "instruct", tmp_path / name)
    options = (*mixed(tmp_path / "a", tmp_path / "b"), "max_duration=4ba", "save_interval=2ba")
    broken("begun", *options, at=(3,), finish=False)
    shutil.rmtree(tmp_path / "a" / "train")
    shutil.copytree(smoke / "instruct" / "test", tmp_path / "a" / "train")
    with pytest.raises(DataError, match=r"the dataset of this run is not what it was begun with"):
        run(*RESUMED, *options, "run_name=begun")


def test_changes_are_refused_by_name_unless_allowed(broken, run, smoke, tmp_path):
    options = ("max_duration=6ba", "save_interval=2ba", "run_name=begun")

    def resume(*changes: str, **more):
        return run(*RESUMED, *options, *changes, **more)

    data = tmp_path / "data"
    shutil.copytree(smoke / "instruct", data)
    broken("begun", *options, at=(3,), finish=False)
    for change, key in {
        "seed=3": "seed", "global_train_batch_size=8": "global_train_batch_size",
        "lora.r=8": "lora", "optimizer.lr=1": "optimizer",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=rf"begun with another config \({key} changed\).*"
                           rf"resume\.allow=\[{key}\]"):  # fmt: skip
            resume(change)
    with pytest.raises(ConfigError, match=r"data_local changed"):
        resume(data=data)
    with pytest.raises(ConfigError, match=r"autoresume: false, but begun has checkpoints"):
        resume("autoresume=false", "resume.allow=[autoresume]")
    changes = ("optimizer.lr=0.5", "optimizer.betas=[0.5, 0.9]", "resume.allow=[optimizer]")
    code, folder = resume(*changes, "progress_bar=false")
    assert code == 0
    assert result(folder)["steps"] == 6
    # From where it was on it is what it would have been by these settings.
    rates = {r["step"]: r["learning_rate"] for r in records(folder, "train")}
    run(*RESUMED, *options[:2], "run_name=other", *changes[:2])
    theirs = {r["step"]: r["learning_rate"] for r in records(Path("runs/other"), "train")}
    assert [rates[n] for n in (4, 5, 6)] == pytest.approx([theirs[n] for n in (4, 5, 6)])
    groups = final_state(folder)["optimizers"]["AdamW"]["param_groups"]
    assert all(tuple(group["betas"]) == (0.5, 0.9) for group in groups)


def test_a_run_goes_on_where_its_checkpoints_were(broken, run, tmp_path, monkeypatch):
    options = ("max_duration=6ba", "save_interval=2ba")
    whole = broken("whole", *options)
    broken("begun", *options, at=(3,), finish=False)
    moved = ("run_name=begun", f"save_folder={tmp_path / 'there'}")
    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:  # before it can save
        patch.setattr(recipe, "build_callbacks", lambda config: 1 / 0)
        run(*RESUMED, *options, *moved)
    assert run(*RESUMED, *options, *moved)[0] == 0
    assert curve(Path("runs/begun")) == curve(whole)
    assert (tmp_path / "there" / "ba6").is_dir()


def test_a_load_path_that_is_as_long_as_the_run_is_refused(run):
    _, folder = run("max_duration=2ba", "run_name=first")
    with pytest.raises(ConfigError, match=r"trained for 2ba already.*raise it, or set load_wei"):
        run("max_duration=2ba", "run_name=second", f"load_path={folder}")


def test_another_model_or_tokenizer_under_the_same_name_is_refused(broken, run, smoke, tmp_path):
    places = {"tokenizer": tmp_path / "words", "model": tmp_path / "base"}
    shutil.copytree(smoke / "tokenizer", places["tokenizer"])
    shutil.copytree(smoke / "instruct", tmp_path / "data")
    run("run_name=first", "max_duration=1ba", "eval_loader=null", "eval_first=false")
    shutil.copytree("runs/first/hf", places["model"])
    options = (
        f"tokenizer_name={places['tokenizer']}", f"model.name={places['model']}",
        "model.pretrained=true", "max_duration=4ba", "save_interval=2ba",
    )  # fmt: skip
    broken("begun", *options, at=(3,), finish=False)
    for name, what in (("model", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        file = places[name] / what
        before = file.read_bytes()
        if name == "model":
            weights = load_file(file)
            weights["model.norm.weight"][0] += 1
            save_file(weights, file, {"format": "pt"})
        else:  # which the data tell before the run does
            content = json.loads(before)
            pieces = content["model"]["vocab"]
            pieces["Ġthe"], pieces["Ġto"] = pieces["Ġto"], pieces["Ġthe"]
            file.write_text(json.dumps(content))
        said = {"model": "the model of this run is not what it", "tokenizer": "another tokenizer"}
        with pytest.raises((DataError, ConfigError), match=said[name]):
            run(*RESUMED, *options, "run_name=begun")
        file.write_bytes(before)
    assert run(*RESUMED, *options, "run_name=begun")[0] == 0


def test_other_data_under_the_same_name_is_refused(broken, run, smoke, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(smoke / "instruct", data)
    options = (f"data_local={data}", "max_duration=4ba", "save_interval=2ba")
    broken("begun", *options, at=(3,), finish=False)
    for split in ("train", "test"):
        shutil.rmtree(data / split)
        shutil.copytree(smoke / "instruct" / "test", data / split)
    with pytest.raises(DataError, match=r"the dataset of this run is not what it was begun with"):
        run(*RESUMED, *options, "run_name=begun", "global_train_batch_size=2",
            "device_train_microbatch_size=2",
            "resume.allow=[global_train_batch_size,device_train_microbatch_size]")  # fmt: skip


def test_what_counts_as_a_secret_is_no_change_of_config():
    shown = "seed: 1\nrun_name: '{}'\nmodel:\n  uri: 's3://{}@x'"
    before, now = shown.format("***", "***"), shown.format("my-llama-run", "me:pw")
    assert changed_keys(before, now) == changed_keys(now, before) == []
    now = now.replace("@x", "@y").replace("seed: 1", "seed: 2")
    assert changed_keys(before, now) == ["model", "seed"]


def test_keys_that_an_older_kit_did_not_know_are_no_change_where_they_are_at_rest():
    old, new = "fsdp_config:\n  full: true\n", "fsdp_config:\n  full: true\n  offload: {}\nnew: {}"
    assert changed_keys(old, new.format("false", "null")) == []
    assert changed_keys(new.format("false", "null"), old) == []
    assert changed_keys(old, new.format("true", "3")) == ["fsdp_config", "new"]
    assert changed_keys("a: {x: 0}", "a: {x: null}") == ["a"]
