"""What each gain of LoRA fine-tuning is worth: ours beside ours with one of them switched off.

    OVERTURE_DATA=... python benchmarks/ablation.py

The model, the data and the way of measuring are those of finetune_throughput.py, whose batch size
is used, so run that first. Compilation and another allocator are the other way round: they are off
unless asked for. Writes benchmarks/results/ablation.json.
"""

from ctypes.util import find_library

from finetune_throughput import LENGTH, SHAPE
from turns import measure

OPTIONS = {
    "ours": {},
    "without blocks of attention": {"attention": "sdpa"},
    "without chunks of logits": {"switch": "loss"},
    "without choosing labels": {"switch": "labels"},
    "without its LoRA layer": {"switch": "lora"},
    "without a bfloat16 base": {"dtype": "float32"},
    "without packing": {"data": "unpacked"},
    "without packing, by the longest": {"data": "unpacked", "switch": "length"},
    "without keeping memory": {"switch": "memory"},
    "with torch.compile": {"compile": True},
}
TCMALLOC = find_library("tcmalloc_minimal")
if TCMALLOC:
    OPTIONS["with tcmalloc (LD_PRELOAD)"] = {"environment": {"LD_PRELOAD": TCMALLOC}}
SIDES = {n: {"library": "ours", "dtype": "bfloat16", **o} for n, o in OPTIONS.items()}

if __name__ == "__main__":
    measure("ablation", __doc__, SIDES, SHAPE, LENGTH, size_of="finetune_throughput")
