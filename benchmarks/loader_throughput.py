"""What the guards of data/streams.py cost: our loader beside Streaming's own, on the same shards.

    PYTHONPATH=src python benchmarks/loader_throughput.py --data data/smoke/text --split train

Warm reads local shards, cold fetches them from another folder into an empty cache. Time to the
first batch is from nothing but imported libraries; ours holds the verification of every shard
(warm) or of ledger, index and every shard that arrives (cold). The rate is that of the batches
after the first of each epoch. Both sides share the collator, take turns, and swap who goes first.
Writes benchmarks/results/loader_throughput.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from streaming import StreamingDataLoader, StreamingDataset

from overture.config.schema import Config, DatasetConfig, LoaderConfig, ModelConfig
from overture.data.cache import open_cache
from overture.data.collate import TokenCollator
from overture.data.integrity import read_index, verify_split
from overture.data.loaders import build_loader
from overture.data.schema import INDEX, read_ledger

ROOT = Path(__file__).parents[1]


def build(side: str, local: str, remote: str | None, args: argparse.Namespace, workers: int) -> Any:
    """Return the loader of one side, having checked what that side checks before training."""
    length = read_ledger(Path(args.data) / args.split)["max_seq_len"]
    if side == "bare":
        dataset = StreamingDataset(
            local=local, remote=remote, split=args.split, shuffle=True, shuffle_seed=17,
            batch_size=args.batch_size, num_canonical_nodes=1,
        )  # fmt: skip
        return StreamingDataLoader(
            dataset, batch_size=args.batch_size, collate_fn=BareCollator(length),
            num_workers=workers,
        )  # fmt: skip
    if remote:
        open_cache(remote, local, args.split)
    else:
        verify_split(Path(local) / args.split, read_ledger(Path(local) / args.split))
    config = Config("instruct", ModelConfig("none"), length, "1ep", args.batch_size)
    config.data_local, config.data_remote = local, remote
    rows = LoaderConfig(DatasetConfig(args.split, shuffle=True), num_workers=workers)
    return build_loader(
        config, rows, TokenCollator(config.max_seq_len, 0), batch_size=args.batch_size
    ).dataloader


class BareCollator:  # a class, since worker processes may have to pickle it
    def __init__(self, length: int) -> None:
        self.collate = TokenCollator(length, 0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        for row in rows:
            row["sample_id"] = 0  # the collator wants one; Streaming gives none
        return self.collate(rows)


def measure(side: str, warm: bool, args: argparse.Namespace, workers: int) -> tuple[float, float]:
    """Return (seconds to the first batch, samples per second after it)."""
    with tempfile.TemporaryDirectory() as cache:
        local, remote = (args.data, None) if warm else (f"{cache}/new", args.data)
        first, samples, seconds = None, 0, 0.0
        start = time.perf_counter()
        loader = build(side, local, remote, args, workers)
        for _ in range(args.epochs):
            arrivals = []
            for batch in loader:
                arrivals.append((time.perf_counter(), len(batch["input_ids"])))
            first = first or arrivals[0][0] - start
            seconds += arrivals[-1][0] - arrivals[0][0]
            samples += sum(count for _, count in arrivals[1:])
        return first, samples / seconds


def hashing_speed(args: argparse.Namespace) -> dict[str, float]:
    """Return the size of the split and how fast it is verified, files in the page cache."""
    folder = Path(args.data) / args.split
    size = sum((s.packed or s.raw).bytes for s in read_index(folder / INDEX))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        verify_split(folder, read_ledger(folder))
        times.append(time.perf_counter() - start)
    return {"bytes": size, "gigabytes_per_second": round(size / min(times) / 1e9, 3)}


def environment() -> dict[str, Any]:
    """Return what the figures depend on."""
    names = [
        r for r in Path("/proc/cpuinfo").read_text().splitlines() if r.startswith("model name")
    ]
    packages = ("mosaicml", "mosaicml-streaming", "torch", "numpy", "xxhash")
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(ROOT / "data/smoke/text"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/loader_throughput.json"
    )
    args = parser.parse_args()
    rows = []
    print("workers  start  side  first batch s  samples/s      of bare")
    for workers in args.workers:
        for warm in (True, False):
            found = {"bare": [], "ours": []}
            measure("bare", warm, args, workers)  # warms the page cache and the allocator
            for repetition in range(args.repetitions):
                for side in ("bare", "ours")[:: 1 if repetition % 2 else -1]:
                    found[side].append(measure(side, warm, args, workers))
            for side, runs in found.items():
                first, rate = (statistics.median(column) for column in zip(*runs, strict=True))
                # In pairs, since what else the machine does drifts.
                ratio = statistics.median(
                    ours[1] / bare[1] for ours, bare in zip(runs, found["bare"], strict=True)
                )
                rows.append(
                    {
                        "workers": workers,
                        "start": "warm" if warm else "cold",
                        "side": side,
                        "first_batch_seconds": round(first, 4),
                        "samples_per_second": round(rate, 1),
                        "rate_of_bare": round(ratio, 4),
                        "runs": [(round(first, 4), round(rate, 1)) for first, rate in runs],
                    }
                )
                print(
                    f"{workers:7}  {rows[-1]['start']}   {side}  {first:13.3f}  {rate:9,.0f}  "
                    f"{ratio:11.1%}",
                    flush=True,
                )
    results = {
        "program": "loader_throughput",
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "environment": environment(),
        "verification": hashing_speed(args),
        "rows": rows,
    }
    print(json.dumps({k: results[k] for k in ("verification", "environment")}, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
