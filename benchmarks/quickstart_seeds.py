"""Where the quickstart's loss target comes from: its loss curve over several seeds.

    python benchmarks/quickstart_seeds.py --base_seeds 17 18 --seeds 1 2 3 4 5

Needs data/quickstart (`make quickstart` writes it). Each seed fine-tunes one of the base models, in
turn, through the whole budget, without a target. Writes benchmarks/results/quickstart_seeds.json.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(door: str, yaml: str, folder: str, *overrides: str) -> Path:
    """Train in a fresh run folder and return it."""
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    command = [sys.executable, door, yaml, f"run_folder={folder}", "progress_bar=false", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return ROOT / folder


def main() -> None:
    """Train, print the curve of each seed, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_seeds", type=int, nargs="+", default=[17, 18])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    for seed in args.base_seeds:
        run("main.py", "yamls/pretrain/quickstart.yaml", f"runs/seeds/base-{seed}", f"seed={seed}")
    rows = []
    for index, seed in enumerate(args.seeds):
        base = args.base_seeds[index % len(args.base_seeds)]
        folder = run(
            "finetune.py", "yamls/finetune/quickstart.yaml", f"runs/seeds/{seed}", f"seed={seed}",
            f"model.name=runs/seeds/base-{base}", "callbacks.loss_target=null",
        )  # fmt: skip
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curve = {r["step"]: round(r["cross_entropy"], 4) for r in records if r["kind"] == "eval"}
        metrics = json.loads((folder / "result.json").read_text())["metrics"]
        rows.append({"seed": seed, "base_seed": base, "eval_cross_entropy": curve, **metrics})
        print(rows[-1], flush=True)
    environment = json.loads((folder / "environment.json").read_text())
    environment.pop("command")
    environment["processor"] = processor()
    results = {"program": "quickstart_seeds", "environment": environment, "rows": rows}
    out = ROOT / "benchmarks" / "results" / "quickstart_seeds.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(out.relative_to(ROOT))


def processor() -> str:
    """Return the processor's own name where Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
