"""Numbers that are none, a loader that hangs, and files that mean harm."""

import json
import shutil
import sys

from faults.bench import ANSWER, Bench, Outcome, hear
from overture.data.schema import seal, sha256_file, unseal

# Runs the door with a fault put into the program: `{fault}` defines it.
PROGRAM = """
import math, runpy, sys, time
sys.path[:0] = ["src"]
{fault}
sys.argv = {argv!r}
runpy.run_path("finetune.py", run_name="__main__")
"""
LOSS = """
from overture.models.causal_lm import CausalLM
loss, calls = CausalLM.loss, []
def spoiled(self, outputs, batch):
    calls.append(0)
    return loss(self, outputs, batch) * (math.{value} if len(calls) == {call} else 1.0)
CausalLM.loss = spoiled
"""
GRADIENT = """
from composer import Callback
from overture.training import run
class Spoil(Callback):
    def after_backward(self, state, logger):
        if state.timestamp.batch.value == {call}:
            next(p for p in state.model.parameters() if p.grad is not None).grad[0] = math.{value}
build = run.build_callbacks
run.build_callbacks = lambda config: [*build(config), Spoil()]
"""
HANG = """
from overture.data.streams import TokenStream
get, calls = TokenStream.get_item, []
def hang(self, *args, **options):
    calls.append(0)
    time.sleep(1000 * (len(calls) > {call}))
    return get(self, *args, **options)
TokenStream.get_item = hang
"""
BASENAMES = ("../../x", "/etc/passwd", "index.json", "dataset.json", "a/b", "", ".", "\x00")
TYPES = ("pkl", "pil", "jpeg", "json", "ndarray:object", "eval")


def not_finite(bench: Bench, most: int) -> list[Outcome]:
    """A loss or a gradient is NaN or Inf: no step is made on it."""
    template = bench.rng.choice([LOSS, GRADIENT])
    fault = template.format(value=bench.rng.choice(["nan", "inf"]), call=_call(bench))
    return [_spoilt(bench, fault, "is not finite; its samples are in", "bad_batch.json")]


def hang(bench: Bench, most: int) -> list[Outcome]:
    """The loader hangs: the watchdog ends the run."""
    fault = HANG.format(call=8 * _call(bench))
    return [_spoilt(bench, fault, "no batch was finished for 5 seconds", "stacks-*.txt")]


def _call(bench: Bench) -> int:
    return bench.rng.randrange(2, bench.steps)


def _spoilt(bench: Bench, fault: str, sentence: str, trace: str) -> Outcome:
    folder = bench.fresh("spoilt")
    command = bench.train(folder)
    argv = [*command[1:], "guards.timeout=5"]
    program = [sys.executable, "-c", PROGRAM.format(fault=fault, argv=argv)]
    process = bench.start(program)
    said = hear(process, 2 * ANSWER)
    named = process.returncode == 5 and sentence in said and bool(list(folder.glob(trace)))
    result = json.loads((folder / "result.json").read_text())
    named = named and result["status"] == "failed" and "Traceback" not in said
    same, seconds, again = bench.go_on(folder, command)
    note = "" if named and same else f"exit {process.returncode}: {said[-300:]} {again[-200:]}"
    shutil.rmtree(folder)
    return Outcome(named, same, seconds, note)


def hostile_index(bench: Bench, most: int) -> list[Outcome]:
    """An index that leads out of its folder, runs code, or lies; its ledger vouches for it."""
    data, folder = bench.fresh("data"), bench.fresh("run")
    shutil.copytree(bench.data(), data)
    train = data / "train"
    index = json.loads((train / "index.json").read_text())
    shard = index["shards"][0]
    kind = bench.rng.choice(["name", "type", "count", "shape", "nesting"])
    if kind == "name":
        shard["raw_data"]["basename"] = bench.rng.choice(BASENAMES)
    elif kind == "type":
        shard["column_encodings"][0] = bench.rng.choice(TYPES)
    elif kind == "count":
        shard["samples"] = bench.rng.choice([0, -1, True, "many", 1.5])
    elif kind == "shape":
        key = bench.rng.choice(list(shard))
        shard[key] = bench.rng.choice([v for v in (None, [], "x", {}) if v != shard[key]])
    text = "[" * 100_000 if kind == "nesting" else json.dumps(index)
    (train / "index.json").write_text(text)
    ledger = unseal(train / "dataset.json")
    for entry in ledger["files"]:
        if entry["name"] == "index.json":
            entry.update(bytes=len(text), sha256=sha256_file(train / "index.json"))
    (train / "dataset.json").write_text(seal(ledger))
    done, seconds = bench.finish(bench.train(folder, f"data_local={data}"))
    named = done.returncode == 4 and f"{train}/" in done.said and "Traceback" not in done.said
    named = named and not folder.exists()
    note = "" if named else f"{kind} {shard}, exit {done.returncode}: {done.said[-300:]}"
    shutil.rmtree(data)
    return [Outcome(named, None, seconds, note)]


def hostile_model(bench: Bench, most: int) -> list[Outcome]:
    """A model whose config.json asks for code or for a kernel of its maker."""
    model, folder, key = bench.fresh("model"), bench.fresh("run"), "auto_map"
    model.mkdir(parents=True)
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    kind = bench.rng.choice(["auto_map", "inner", "_attn_implementation_internal"])
    if kind == "auto_map":
        content["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    else:
        key = "_attn_implementation_internal"
        held = {key: "somebody/kernel"}
        content |= held if kind == key else {"text_config": held}
    (model / "config.json").write_text(json.dumps(content))
    (model / "modeling.py").write_text(f"open({str(model / 'ran')!r}, 'w')\n")
    options = (f"model.name={model}", "model.pretrained=true", "model.config={}")
    done, seconds = bench.finish(bench.train(folder, *options))
    named = done.returncode == 2 and key in done.said and str(model) in done.said
    named = named and "Traceback" not in done.said and not (model / "ran").exists()
    note = "" if named else f"{kind}, exit {done.returncode}: {done.said[-300:]}"
    shutil.rmtree(model)
    shutil.rmtree(folder, ignore_errors=True)
    return [Outcome(named, None, seconds, note)]
