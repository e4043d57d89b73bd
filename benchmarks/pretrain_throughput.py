"""Pretraining from scratch: ours beside HF Trainer, the same weights and rows of 1,024 tokens.

    OVERTURE_DATA=... python benchmarks/pretrain_throughput.py [--search]

The model and the way of measuring are those of finetune_throughput.py; all weights are trained, and
every token is a label. Writes benchmarks/results/pretrain_throughput.json.
"""

from finetune_throughput import PRETRAIN, main

if __name__ == "__main__":
    main("pretrain_throughput", list(PRETRAIN))
