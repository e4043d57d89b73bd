"""Sides that train in processes of their own, taking turns, and the table of what they reached.

Each side is its own library's Trainer, on the same weights and documents. The processes take turns,
a timed window each, until each has had its share. Before that, our loss and that of transformers
must be equal on the same documents. Counted are real tokens: padding is none. Memory is the peak
above that after the imports. FLOPs are those that real tokens need.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sides import documents

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "mosaicml", "mosaicml-streaming")


class SideError(Exception):
    """A side that broke off: for want of memory, or by an error of its library."""


class Side:
    """A process that trains for a window when asked."""

    def __init__(self, name: str, batch: int, folder: Path, limit: float | None = None) -> None:
        """Start it, and see it through its warm-up; with a `limit` in seconds, only start it."""
        self.name, self.batch, self.limit = name, batch, limit
        self.log = (folder / f"{name.replace(' ', '-')}-{batch}.log").open("w+")
        options = json.loads((folder / "plan.json").read_text())["sides"][name]
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "benchmarks" / "sides.py", name, str(batch), folder], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=folder,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
            | options.get("environment", {}),
        )  # fmt: skip
        self.windows: list[dict[str, float]] = []
        if limit is None:
            self.read()  # the warm-up

    def read(self) -> dict[str, float]:
        """Wait for the end of a window and return it."""
        ending = threading.Timer(self.limit or 1e6, self.process.kill)
        ending.start()
        try:
            for line in self.process.stdout:
                if line.startswith("WINDOW "):
                    return json.loads(line.removeprefix("WINDOW "))
        finally:
            ending.cancel()
        self.log.seek(0)
        raise SideError(f"{self.name} ended: {self.log.read()[-1000:]}")

    def go(self) -> dict[str, float]:
        """Train for one window, or for the warm-up, and return what it held."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def run(self) -> None:
        """Train for one window and keep it."""
        self.windows.append(self.go())

    def end(self) -> None:
        """Stop, and give the memory back."""
        self.process.stdin.write("\n")
        self.process.stdin.close()
        self.process.wait()

    def rate(self, what: str = "tokens") -> float:
        """Return the median over the windows, per second."""
        return statistics.median(w[what] / w["seconds"] for w in self.windows)


def prepare(
    folder: Path, shape: dict[str, Any], length: int, dtype: str = "float32", others: bool = True
) -> None:
    """Write the tokenizer, the packed documents and the weights that all sides share, and the
    `others` among the data: unpacked documents, and text.
    """
    import torch
    from convert_throughput import gpt2

    from overture.config.schema import ModelConfig
    from overture.data.conversion import Conversion, Origin
    from overture.data.convert import convert
    from overture.models.build import load_network
    from overture.tokenizer import load_tokenizer

    if not (data := os.environ.get("OVERTURE_DATA")):
        sys.exit("error: OVERTURE_DATA: name the folder of the real datasets with it")
    data = Path(data)
    tokenizer = gpt2(data, folder / "gpt2")
    origin = Origin(str(data / "dolly" / "databricks-dolly-15k.jsonl"))
    job = Conversion({"train": origin}, "instruct", str(folder / "data"), tokenizer=tokenizer,
                     max_seq_len=length)  # fmt: skip
    unpacked = replace(job, out_root=str(folder / "unpacked"), packing="none")
    text = replace(job, out_root=str(folder / "text"), task="text", packing="concat",
                   prompt_template="passage")  # fmt: skip
    for one in (job, unpacked, text) if others else (job,):
        convert(one, say=lambda _: None)
    torch.manual_seed(0)
    loaded = load_tokenizer(tokenizer)
    network = load_network(ModelConfig("llama", False, "float32", "sdpa", shape), loaded, length)
    network.to(getattr(torch, dtype)).save_pretrained(folder / "model")


def check_losses(folder: Path, length: int) -> dict[str, float]:
    """Return the loss of some documents by each route, having seen that they are equal."""
    import torch
    from transformers import AutoModelForCausalLM

    from overture.config.schema import ModelConfig
    from overture.data.collate import TokenCollator
    from overture.data.shards import Split
    from overture.models.build import load_network
    from overture.models.causal_lm import CausalLM
    from overture.tokenizer import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    split = Split(folder / "data" / "train")
    rows = [{**split.row(number), "sample_id": number} for number in range(2)]
    batch = TokenCollator(length, 0)(rows)
    batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
    network = load_network(
        ModelConfig(str(folder / "model"), True, "float32", "auto", {}), tokenizer
    ).to(device)
    model = CausalLM(network, tokenizer, None)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    theirs.to(device)
    total = count = 0.0
    with torch.no_grad():
        ours = model.loss(model(batch), batch).item()
        for number in range(2):
            start = 0
            for end in rows[number]["document_ends"].tolist():
                labels = batch["labels"][number : number + 1, start:end]
                learned = int((labels[:, 1:] != -100).sum())
                out = theirs(input_ids=batch["input_ids"][number : number + 1, start:end],
                             labels=labels)  # fmt: skip
                total, count, start = total + out.loss.item() * learned, count + learned, end
    del network, model, theirs, out
    if device == "cuda":
        torch.cuda.empty_cache()  # the sides want the memory
    losses = {"ours": ours, "transformers": total / count}
    if abs(losses["ours"] - losses["transformers"]) > 1e-3:
        raise SystemExit(f"the losses differ: {losses}")
    return losses


def search(names: list[str], folder: Path, sizes: tuple[int, ...]) -> dict[str, int]:
    """Return the best batch size of each side, by one window each."""
    best = {}
    for name in names:
        rates = {}
        for batch in sizes:
            try:
                side = Side(name, batch, folder)
                side.run()
            except SideError as error:  # larger batches will not do better
                print(error, flush=True)
                break
            side.end()
            rates[batch] = side.rate()
        if rates:
            best[name] = max(rates, key=rates.get)
        print(f"{name}: " + ", ".join(f"{b}: {r:,.0f}" for b, r in rates.items()), flush=True)
    return best


def measure(
    program: str, doc: str, sides: dict[str, dict[str, Any]], shape: dict[str, Any], length: int,
    sizes: tuple[int, ...] = (1, 2, 4, 8), size_of: str = "", results: bool = True,
    arguments: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the sides, print the table, write `results/<program>.json` and return it.

    Batch sizes are those of the stored results, else or with --search the fastest of `sizes`; or
    all that of "ours" in the results of `size_of`. With --sides nothing is written.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="find the best batch sizes again")
    parser.add_argument("--windows", type=int, default=5, help="timed windows of each side")
    parser.add_argument("--sides", nargs="+", default=list(sides), choices=list(sides))
    args = parser.parse_args(arguments)
    known: dict[str, int] = {}
    earlier = RESULTS / f"{size_of or program}.json"
    if earlier.exists() and not args.search:
        known = json.loads(earlier.read_text())["batch_sizes"]
        known = dict.fromkeys(sides, known["ours"]) if size_of else known
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps({"length": length, "sides": sides}))
        prepare(folder, shape, length)
        losses = check_losses(folder, length)
        print(f"losses on the same documents: {losses}", flush=True)
        batches = known | search([s for s in args.sides if s not in known], folder, sizes)
        running = [Side(side, batches[side], folder) for side in args.sides if side in batches]
        for number in range(args.windows):
            for side in running[:: -1 if number % 2 else 1]:
                peak = measured_peak()
                side.run()
                # A shared machine's pace changes: what it can do is asked beside each window.
                side.windows[-1]["peak"] = statistics.mean([peak, measured_peak()])
        for side in running:
            side.end()
        lengths = [len(document["input_ids"]) for document in documents(folder / "data")]
    mean = sum(length**2 for length in lengths) / sum(lengths)
    table = {side.name: row(side, sides[side.name], shape, length, mean) for side in running}
    peaks = [window["peak"] / 1e9 for side in running for window in side.windows]
    result = {
        "program": program, "losses": losses, "model": shape,
        "batch_sizes": {side.name: side.batch for side in running},
        "bfloat16_gigaflops": {"median": statistics.median(peaks), "of each window": peaks},
        "sides": table, "environment": environment(),
    }  # fmt: skip
    ours, *others = running
    result["ratios"] = {side.name: ratio(ours, side) for side in others}
    print(f"{ours.name} to each: " + ", ".join(f"{n} {r:.2f}" for n, r in result["ratios"].items()))
    if results and args.sides == list(sides):
        (RESULTS / f"{program}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def measure_alone(
    program: str, doc: str, sides: dict[str, dict[str, Any]], shape: dict[str, Any], length: int,
    limit: float, results: bool, arguments: list[str],
) -> None:  # fmt: skip
    """Measure the sides one after the other, as a GPU's memory has room for one of them.

    Each is tried at each of its `sizes`, and a window or a warm-up of more than `limit` seconds is
    broken off. Results are written after each side: a machine that is lent may go at any time.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--windows", type=int, default=5, help="timed windows of each side")
    parser.add_argument("--sides", nargs="+", default=list(sides), choices=list(sides))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder, plan = Path(name), {"length": length, "sides": sides, "alone": True}
        (folder / "plan.json").write_text(json.dumps(plan))
        # All import at once, and wait.
        waiting = [Side(s, b, folder, limit) for s in args.sides for b in sides[s]["sizes"]]
        prepare(folder, shape, length, "bfloat16", others=False)
        losses = check_losses(folder, length)
        print(f"losses on the same documents: {losses}", flush=True)
        lengths = [len(document["input_ids"]) for document in documents(folder / "data")]
        mean = sum(length**2 for length in lengths) / sum(lengths)
        table: dict[str, dict[str, Any]] = {}
        for side in waiting:
            before = measured_peak()
            try:
                side.go()
                for _ in range(args.windows):
                    side.run()
            except SideError as error:
                print(f"{error}\nat batch size {side.batch}", flush=True)
                continue
            finally:
                side.process.kill()
                side.process.wait()
            peak = statistics.mean([before, measured_peak()])
            side.windows = [{**window, "peak": peak} for window in side.windows]
            found = row(side, sides[side.name], shape, length, mean)
            kept = table.setdefault(side.name, {**found, "tried": {}})
            if found["tokens_per_second"] > kept["tokens_per_second"]:
                kept |= found
            kept["tried"][side.batch] = [found["tokens_per_second"], found["peak_mib"]]
            rates = {name: found["tokens_per_second"] for name, found in table.items()}
            result = {
                "program": program, "losses": losses, "model": shape,
                "bfloat16_gigaflops": peak / 1e9, "sides": table,
                "ratios": {n: max(rates.values()) / r for n, r in rates.items()},
                "environment": environment(),
            }  # fmt: skip
            if results:
                (RESULTS / f"{program}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("the fastest to each: " + ", ".join(f"{n} {r:.2f}" for n, r in result["ratios"].items()))


def ratio(one: Side, other: Side) -> float:
    """Return how many times as fast one side is, the median over the rounds of turns."""
    rates = ([w["tokens"] / w["seconds"] for w in side.windows] for side in (one, other))
    return statistics.median(a / b for a, b in zip(*rates, strict=True))


def measured_peak() -> float:
    """Return the FLOP/s of large bfloat16 products on this machine."""
    import torch

    from overture.callbacks.throughput import measured_peak

    return measured_peak(torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")


def row(
    side: Side, options: dict[str, Any], shape: dict[str, Any], length: int, mean: float
) -> dict[str, Any]:
    """Return the figures of a side, having printed them; `mean` is the squared lengths' share."""
    from overture.flops import training_flops

    tokens, labels = side.rate("tokens"), side.rate("labels")
    width, depth, size = (shape[k] for k in ("hidden_size", "num_hidden_layers", "head_dim"))
    heads, shared = shape["num_attention_heads"], shape["num_key_value_heads"]
    attended = width * size * (2 * heads + 2 * shared)
    weights = depth * (attended + 3 * width * shape["intermediate_size"])
    head = shape.get("vocab_size", 50257) * width
    every = options.get("all", False)
    squares = tokens * (length if every else mean)
    flops = training_flops(weights, head, not every, tokens, labels, depth, heads * size, squares)
    share = statistics.median(
        flops / tokens * w["tokens"] / w["seconds"] / w["peak"] for w in side.windows
    )
    memory = side.windows[-1]["peak_mib"]
    print(f"{side.name:<34}{side.batch:>3}{tokens:>9,.0f} tokens/s{labels:>9,.0f} labels/s"
          f"{memory:>8,.0f} MiB{share:>8.1%}")  # fmt: skip
    return {
        "batch": side.batch, "tokens_per_second": tokens, "labels_per_second": labels,
        "peak_mib": memory, "share_of_matrix_products": share, "windows": side.windows,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Return the machine, the versions and the commit."""
    import torch

    from overture.training.cores import processor

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(), "gpu": gpu, "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), "versions": versions,
        "commit": commit.stdout.strip(),
    }  # fmt: skip
