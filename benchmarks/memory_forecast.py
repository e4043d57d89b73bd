"""The memory that src/check_setup.py foretells beside what runs then take, above the imports.

    python benchmarks/memory_forecast.py     # a GPU if there is one, else the CPU

Models of 25 to 90 million parameters on the data of `make venv`, in all tasks. Each is looked at by
the doctor in a process of its own, and trained for three steps in another. What four rows alone
would have foretold stands beside it. Writes benchmarks/results/memory_forecast.json; with --cases
the others there stay. Exit code 1 if one of them is more than 15 % away.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from turns import RESULTS, environment

ROOT = Path(__file__).parents[1]
LLAMA = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
         "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
BERT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8}  # fmt: skip
BART = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
        "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "LoRA, bfloat16 base": ("finetune", "llama", LLAMA, {"device_train_microbatch_size": 32}),
    "LoRA, float32 base": ("finetune", "llama", LLAMA, {"model.dtype": "float32"}),
    "LoRA, checkpointed": ("finetune", "llama", LLAMA, {
        "model.activation_checkpointing": True, "model.dtype": "float32",
        "device_train_microbatch_size": 64}),
    "all": ("pretrain", "llama", LLAMA, {}),
    "all, autocast": ("pretrain", "llama", LLAMA, {"precision": "amp_bf16"}),
    "MosaicBERT": ("mlm", "mosaic_bert", BERT, {"device_train_microbatch_size": 32}),
    "HF BERT": ("mlm", "hf_bert", BERT, {"device_train_microbatch_size": 32}),
    "translation": ("seq2seq", "bart", BART, {"device_train_microbatch_size": 32}),
    "classification": ("classify", "hf_bert", BERT, {"device_train_microbatch_size": 64}),
}  # fmt: skip
CHILD = """
import json, sys
sys.path[:0] = [sys.argv[1] + "/src", sys.argv[1]]
import peft, torchmetrics
import overture.training.run
from overture.config.load import load_config
from overture.config.schema import DOORS
from overture.training import rehearsal
from overture.training.quiet import quiet_libraries
quiet_libraries()
config = load_config(sys.argv[3:], tasks=tuple(DOORS))
meter = rehearsal.Meter()
if sys.argv[2] == "foretell":
    found = rehearsal.rehearse(config, 1 << 40)
    forecast = max(sum(found.parts.values()), found.loading)
    more = {"from few": found.foretold, "whole": found.whole}
    print("FOUND " + json.dumps([forecast, {**found.parts, **more}]))
else:
    meter.reset()
    overture.training.run.train(config, "")
    print("FOUND " + json.dumps([meter.peak(), {}]))
"""


def peak_of(kind: str, arguments: list[str]) -> tuple[int, dict[str, int]]:
    """Return the bytes that a process found, and their parts."""
    command = [sys.executable, "-c", CHILD, str(ROOT), kind, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            return json.loads(line.removeprefix("FOUND "))
    sys.exit(done.stdout[-500:] + done.stderr[-2000:])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    path, rows = RESULTS / "memory_forecast.json", {}
    for name in parser.parse_args().cases:
        yaml, model, shape, more = CASES[name]
        options = {"global_train_batch_size": 64, "device_train_microbatch_size": 16,
                   "model.name": model, "model.config": json.dumps(shape)} | more  # fmt: skip
        options |= {"max_duration": "3ba", "eval_interval": "3ba", "eval_first": False}
        with tempfile.TemporaryDirectory() as folder:
            options["run_folder"] = f"{folder}/run"
            arguments = [f"yamls/smoke/{yaml}.yaml", *(f"{k}={v}" for k, v in options.items())]
            foretold, parts = peak_of("foretell", arguments)
            measured, _ = peak_of("train", arguments)
        rows[name] = {"foretold": foretold, "measured": measured, "parts": parts}
        gib, away = 2**30, foretold / measured - 1
        few = f"{parts['from few'] / gib:.2f}" + ", which was all" * (not parts["whole"])
        print(f"{name:<22} foretold {foretold / gib:6.2f} GiB, measured {measured / gib:6.2f}: "
              f"{away:+.1%}, from four rows {few}", flush=True)  # fmt: skip
    worst = max(abs(row["foretold"] / row["measured"] - 1) for row in rows.values())
    print(f"the farthest is {worst:.1%} away")
    if rows.keys() != CASES.keys() and path.is_file():
        rows = json.loads(path.read_text())["cases"] | rows
    written = {"program": "memory_forecast", "cases": rows, "environment": environment()}
    path.write_text(json.dumps(written, indent=1) + "\n")
    sys.exit(int(worst > 0.15))


if __name__ == "__main__":
    main()
