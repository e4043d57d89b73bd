"""Inject faults into real runs, and print for each kind how often it was met, and how fast.

    make faults             some 25 minutes on two cores
    make faults FULL=1      more than an hour; after an interruption it goes on where it was, and
                            its table is written to benchmarks/results/faults.json

Exit code 1 if a bar is missed: every kill ends bit-identical, nothing is silent, and every answer
comes within 60 seconds.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from faults import content, damage, kills, storage
from faults.bench import ANSWER, ROOT, Bench, Outcome
from overture.training.cores import processor

# Each kind with how often it is tried, and how often in full.
KINDS = {
    kills.training: (10, 50),
    kills.saving: (5, 25),
    kills.converting: (5, 25),
    kills.group: (5, 20),
    kills.rank: (2, 5),
    kills.worker: (2, 5),
    kills.sigterm: (2, 5),
    damage.shard: (15, 50),
    damage.index: (10, 35),
    damage.ledger: (10, 35),
    damage.checkpoint: (15, 50),
    damage.manifest: (10, 30),
    damage.truncation: (5, 15),
    damage.missing: (2, 5),
    storage.missing_object: (1, 3),
    storage.error_500_for_a_while: (1, 3),
    storage.error_500: (1, 3),
    storage.slow: (1, 3),
    storage.silent: (1, 3),
    storage.wrong_bytes_once: (1, 3),
    storage.wrong_bytes: (1, 3),
    storage.full_disk_converting: (2, 5),
    storage.full_disk_saving: (2, 5),
    storage.leaked_shared_memory: (1, 3),
    storage.one_cache: (1, 3),
    content.not_finite: (3, 8),
    content.hang: (1, 3),
    content.hostile_index: (5, 15),
    content.hostile_model: (3, 6),
}


def main() -> int:
    """Try all kinds, print the table, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="as kills.training")
    parser.add_argument("--times", type=int, help="how often each is tried, at most")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = ROOT / "runs" / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / f"{'full' if options.full else 'short'}.jsonl"
    commit = _commit()
    bench = Bench(folder / commit, random.Random())
    bench.folder.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in journal.open()] if journal.exists() else []
    rows = [row for row in lines if row["commit"] == commit]  # what is said is said of one
    started, full = time.monotonic(), options.full
    for kind, counts in KINDS.items():
        name = _name(kind)
        if options.only and name not in options.only:
            continue
        if "full_disk" in name and not storage.may_mount():
            print(f"{name}: left out, as this user may not mount a small disk")
            continue
        done = sum(row["kind"] == name for row in rows)
        count = min(counts[full], options.times or counts[full])
        while done < count:
            bench.rng.seed(f"{name} {done}")
            for outcome in kind(bench, count - done):
                row = {"kind": name, "commit": commit, **vars(outcome), "silent": outcome.is_silent}
                rows.append(row)
                done += 1
                with journal.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"[{time.monotonic() - started:5.0f} s] {_line(name, done, outcome)}",
                    flush=True,
                )
    table = {_name(kind): _summary(kind, rows) for kind in KINDS if _summary(kind, rows)["tried"]}
    _print(table)
    if options.only or options.times:
        return 0
    if options.full:
        environment = {
            "commits": sorted({row["commit"] for row in rows}), "date": time.strftime("%F"),
            "cpu": processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        }  # fmt: skip
        path = ROOT / "benchmarks" / "results" / "faults.json"
        path.write_text(json.dumps({"environment": environment, "faults": table}, indent=1) + "\n")
    journal.rename(journal.with_name(f"{journal.stem}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"))
    return int(any(row["bars"] != "met" for row in table.values()))


def _summary(kind, rows: list[dict]) -> dict:
    own = [row for row in rows if row["kind"] == _name(kind)]
    tried = [row for row in own if row["recovered"] is not None]
    summary = {
        "what": kind.__doc__.splitlines()[0],
        "tried": len(own),
        "detected": sum(row["detected"] for row in own),
        "recovered": sum(row["recovered"] for row in tried) if tried else None,
        "silent": sum(row["silent"] for row in own),
        "seconds": round(max((row["seconds"] for row in own), default=0), 1),
    }
    fine = summary["tried"] == summary["detected"] and summary["seconds"] < ANSWER
    summary["bars"] = "met" if fine and all(row["recovered"] for row in tried) else "missed"
    return summary


def _print(table: dict[str, dict]) -> None:
    print(f"\n{'fault':<72} tried detected recovered silent seconds")
    for row in table.values():
        recovered = "-" if row["recovered"] is None else row["recovered"]
        print(
            f"{row['what'][:72]:<72} {row['tried']:>5} {row['detected']:>8} {recovered:>9} "
            f"{row['silent']:>6} {row['seconds']:>7}{'  MISSED' * (row['bars'] != 'met')}"
        )


def _line(name: str, number: int, outcome: Outcome) -> str:
    words = ["detected" if outcome.detected else "NOT DETECTED"]
    if outcome.recovered is not None:
        words.append("recovered" if outcome.recovered else "NOT RECOVERED")
    return f"{name} {number}: {', '.join(words)}, {outcome.seconds:.1f} s {outcome.note}".rstrip()


def _name(kind) -> str:
    return f"{Path(kind.__code__.co_filename).stem}.{kind.__name__}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
