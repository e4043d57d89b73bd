"""From the command to the first training step, beside importing Composer and loading the model.

    python benchmarks/startup.py [--repetitions 5]

The command is `python finetune.py yamls/finetune/quickstart.yaml`, without its evaluation before
training, on the base model and shards of `make quickstart`, which must be there. Both are timed
from the start of a fresh process, in turns, with modules compiled. Writes
benchmarks/results/startup.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from turns import RESULTS, ROOT, environment

MODEL = "runs/quickstart-base/hf"
BARE = f"""
import time
import composer
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("{MODEL}")
print("READY", time.time())
"""
OURS = """
import runpy, sys, time
sys.path.insert(0, "src")
from composer import Callback
from overture.training import run

class First(Callback):
    def before_train_batch(self, state, logger):
        print("READY", time.time(), flush=True)

run.build_callbacks = lambda config: [First()]
runpy.run_path("finetune.py", run_name="__main__")
"""


def seconds(program: str, *arguments: str) -> float:
    """Return how long a fresh process takes until it says that it is ready."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
    )  # fmt: skip
    ready = [x for x in done.stdout.replace("\r", "\n").splitlines() if "READY" in x]
    if not ready:
        raise SystemExit(f"no training step:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return float(ready[0].split()[-1]) - began


def main() -> None:
    """Time both in turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(args.repetitions + 1):  # the first one compiles modules
        with tempfile.TemporaryDirectory() as folder:
            pair = seconds(BARE), seconds(
                OURS, "yamls/finetune/quickstart.yaml", f"run_folder={folder}", "max_duration=1ba",
                "eval_first=false", "generation=null", "callbacks.loss_target=null",
                "progress_bar=false",
            )  # fmt: skip
        if number:
            for name, value in zip(times, pair, strict=True):
                times[name].append(round(value, 2))
    bare, ours = (statistics.median(x) for x in times.values())
    print(f"bare {bare:.2f} s, ours {ours:.2f} s, ratio {ours / bare:.2f}")
    result = {"program": "startup", "seconds": times, "ratio": ours / bare,
              "environment": environment()}  # fmt: skip
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
