"""What the guards of training cost: ours beside ours without them.

    OVERTURE_DATA=... python benchmarks/guards_cost.py [--windows 10]

The model, the data and the way of measuring are those of finetune_throughput.py, whose batch size
is used. Without are the checks of loss and gradients, the watchdog and the watch for spikes;
checkpoints are not written while it is timed. Writes benchmarks/results/guards_cost.json.
"""

from finetune_throughput import LENGTH, SHAPE
from turns import measure

OPTIONS = {"ours": {}, "without guards": {"switch": "guards"}}
SIDES = {n: {"library": "ours", "dtype": "bfloat16", **o} for n, o in OPTIONS.items()}

if __name__ == "__main__":
    measure("guards_cost", __doc__, SIDES, SHAPE, LENGTH, stored_with=("finetune_throughput",))
