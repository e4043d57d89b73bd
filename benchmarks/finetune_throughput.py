"""LoRA fine-tuning on real Dolly: ours beside HF Trainer with PEFT, and TRL's SFTTrainer.

    OVERTURE_DATA=... python benchmarks/finetune_throughput.py [--search] [--windows 5]

A Llama of 8 layers x 512 (8 heads, 4 key-value heads, 1,376 wide MLP, tied embeddings, GPT-2's
vocabulary), LoRA r=16 on all linear layers, documents of at most 1,024 tokens, two cores. How it is
measured stands in turns.py, what each side does in sides.py. TRL is in requirements-benchmark.txt.
Writes benchmarks/results/finetune_throughput.json.
"""

from turns import measure

LENGTH = 1024
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "tie_word_embeddings": True, "max_position_embeddings": LENGTH,
}  # fmt: skip
SIDES = {
    "ours": {"library": "ours", "dtype": "bfloat16"},
    "hf float32": {"library": "hf", "dtype": "float32"},
    "hf float32, fixed length": {"library": "hf", "dtype": "float32", "fixed": True},
    "hf bfloat16": {"library": "hf", "dtype": "bfloat16"},
    "hf bfloat16, fixed length": {"library": "hf", "dtype": "bfloat16", "fixed": True},
    "trl bfloat16": {"library": "trl", "dtype": "bfloat16"},
    "trl bfloat16, packed": {"library": "trl", "dtype": "bfloat16", "packing": True},
}

if __name__ == "__main__":
    measure("finetune_throughput", __doc__, SIDES, SHAPE, LENGTH)
