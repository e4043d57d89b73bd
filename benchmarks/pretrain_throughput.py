"""Pretraining from scratch: ours beside HF Trainer, the same weights and rows of 1,024 tokens.

    OVERTURE_DATA=... python benchmarks/pretrain_throughput.py [--search]

The model and the way of measuring are those of finetune_throughput.py; all weights are trained, and
every token is a label. Writes benchmarks/results/pretrain_throughput.json.
"""

from finetune_throughput import LENGTH, SHAPE
from turns import measure

OPTIONS = {
    "ours, bfloat16 autocast": {"library": "ours", "precision": "amp_bf16"},
    "ours, float32": {"library": "ours"},
    "hf float32": {"library": "hf"},
    "hf, bfloat16 autocast": {"library": "hf", "autocast": True},
}
SIDES = {n: {"dtype": "float32", "data": "text", "all": True, **o} for n, o in OPTIONS.items()}

if __name__ == "__main__":
    measure("pretrain_throughput", __doc__, SIDES, SHAPE, LENGTH)
