"""What each gain of LoRA fine-tuning is worth: ours beside ours with one of them switched off.

    OVERTURE_DATA=... python benchmarks/ablation.py

The model, the data and the way of measuring are those of finetune_throughput.py, whose stored batch
size is used, so run that first. Writes benchmarks/results/ablation.json.
"""

from finetune_throughput import WITHOUT, main

if __name__ == "__main__":
    main("ablation", ["ours", *WITHOUT])
