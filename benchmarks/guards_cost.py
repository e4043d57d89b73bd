"""What the guards of training cost, and the log: the share of a step that is spent in them.

    OVERTURE_DATA=... python benchmarks/guards_cost.py [--steps 60]

The model and the data are those of finetune_throughput.py. Every event that Composer hands to a
guard is timed, beside the whole: a shared machine's pace then changes both alike, which no
comparison of two runs could resolve to a percent. On a CPU nothing is queued, so that what a guard
asks for is done when it returns. Checkpoints are not written while it is timed. The share of time
outside the model (waiting for data, logging, what Composer does between steps) is the run's own.
Writes benchmarks/results/guards_cost.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune_throughput import LENGTH, SHAPE
from sides import ours_config
from turns import RESULTS, environment, prepare

GUARDS = ("FiniteGuard", "GradientGuard", "SpikeGuard", "Watchdog")
LOGGING = ("Throughput", "RunLog")
WARM_UP = 10


def main() -> None:
    """Train for some steps and write each guard's share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    from composer.core import Callback

    from overture.training import run

    every, began = (*GUARDS, *LOGGING), [0.0, 0.0]
    spent = dict.fromkeys(every, 0.0)

    def timed(guard: type) -> type:
        class Timed(guard):
            def run_event(self, event: Any, state: Any, logger: Any) -> None:
                start = time.perf_counter()
                super().run_event(event, state, logger)
                spent[guard.__name__] += time.perf_counter() - start

        return Timed

    class Clock(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            batch = state.timestamp.batch.value
            if batch == WARM_UP:
                spent.update(dict.fromkeys(every, 0.0))
            if batch in (WARM_UP, WARM_UP + steps):
                began[batch > WARM_UP] = time.perf_counter()

    run.build_callbacks = lambda config: [Clock()]
    for name in every:
        setattr(run, name, timed(getattr(run, name)))
    side = {"library": "ours", "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, SHAPE, LENGTH)
        config = ours_config(folder, LENGTH, 1, side, f"{WARM_UP + steps}ba")
        run.train(config, "benchmark")
        lines = (Path(config.run_folder) / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    # Each is a mean over the ten steps before it.
    outside = statistics.mean(r["outside_share"] for r in records[2 * WARM_UP - 1 :: 10])
    whole = began[1] - began[0]
    shares = {name: seconds / whole for name, seconds in spent.items()}
    print({name: f"{share:.3%}" for name, share in shares.items()})
    together = sum(shares[name] for name in GUARDS)
    print(f"guards together {together:.2%} of {whole / steps:.3f} s a step")
    print(f"outside the model {outside:.2%}")
    result = {
        "program": "guards_cost", "shares": shares, "together": together,
        "outside_the_model": outside,
        "seconds_a_step": whole / steps, "steps": steps, "environment": environment(),
    }  # fmt: skip
    (RESULTS / "guards_cost.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
