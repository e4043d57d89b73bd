"""LoRA, the last layer and all of a model on the same data: what each costs and reaches.

    make quickstart && OVERTURE_DATA=... python benchmarks/trainable.py

Two bases: that of the quickstart on its own instructions, to the loss target of its YAML or the
end of its budget, and stories260K (a Llama of 260 thousand parameters) on real Dolly, 100 steps.
The learning rate of LoRA is the quickstart's, of the others the better of two on its data. Memory
is the peak of the process, of which imports take the most. Writes
benchmarks/results/trainable.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from turns import RESULTS, environment

ROOT = Path(__file__).parents[1]
WAYS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "last_layer": ("trainable=last_layer", "lora=null", "model.dtype=float32"),
    "all": ("trainable=all", "lora=null", "model.dtype=float32"),
}
RATES = {"lora": (5e-3,), "last_layer": (3e-3, 1e-2), "all": (1e-3, 3e-3)}
MISSED = 3  # exit code: the target was not reached


def finetune(name: str, yaml: str, *overrides: str) -> dict[str, Any]:
    """Run finetune.py and return its outcome with the peak memory and the size of what it gives."""
    folder = ROOT / "runs" / "trainable" / name
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    places = (f"run_name={name}", f"run_folder={folder}", "progress_bar=false")
    command = [sys.executable, "finetune.py", yaml, *places, *overrides]
    # A process of its own between, whose children are this one run.
    code = (
        "import resource, subprocess as s, sys; done = s.run(sys.argv[1:], stdout=s.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode not in (0, MISSED):
        raise SystemExit(f"{name}: exit code {done.returncode}")
    result = json.loads((folder / "result.json").read_text())
    weights = [*(folder / "hf").glob("*.safetensors")]
    return {
        "status": result["status"],
        "loss_before": result["eval_cross_entropy_before"],
        "loss": result["eval_cross_entropy"],
        "exact_match": result["metrics"]["exact_match_after"],
        "steps": result["steps"],
        "seconds": result["time_to_train_seconds"],
        "peak_mib": int(done.stdout.split()[-1]) / 1024,
        "file_mib": sum(path.stat().st_size for path in weights) / 2**20,
    }


def show(name: str, row: dict[str, Any]) -> None:
    """Print a row."""
    shown = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
    print(f"{name}: {shown}", flush=True)


def main() -> None:
    """Fine-tune in each way, print and write the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not (ROOT / "runs" / "quickstart-base" / "hf").is_dir():
        raise SystemExit("runs/quickstart-base is missing: make quickstart")
    data = Path(os.environ["OVERTURE_DATA"])
    stories = data / "models" / "stories260K"
    command = ["src/convert_dataset.py", "--task", "instruct", "--tokenizer", str(stories)]
    command += ["--dataset", str(data / "dolly" / "databricks-dolly-15k.jsonl")]
    command += ["--test_fraction", "0.1", "--max_seq_len", "512", "--overwrite"]
    command += ["--out_root", "data/trainable-dolly"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, dict[str, Any]] = {"quickstart": {}, "dolly": {}}
    for way, options in WAYS.items():
        tried = {}
        for rate in RATES[way]:
            name = f"quickstart-{way}-{rate:g}"
            config = ("yamls/finetune/quickstart.yaml", f"optimizer.lr={rate}")
            tried[rate] = finetune(name, *config, *options)
            show(name, tried[rate])
        # That which was there first; of those that did not get there, the lowest.
        best = min(
            tried, key=lambda r: (tried[r]["status"] != "target_reached", tried[r]["seconds"])
            if tried[r]["status"] == "target_reached" else (True, tried[r]["loss"])
        )  # fmt: skip
        found["quickstart"][way] = {"rate": best, **tried[best]}
        more = ("data_local=data/trainable-dolly", "max_duration=100ba", "eval_interval=50ba")
        more = (*more, "generation.num_prompts=24", f"optimizer.lr={best}", f"model.name={stories}")
        found["dolly"][way] = finetune(f"dolly-{way}", "yamls/finetune/dolly.yaml", *more, *options)
        show(f"dolly-{way}", found["dolly"][way])
    result = {"program": "trainable", "environment": environment(), "found": found}
    (RESULTS / "trainable.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
