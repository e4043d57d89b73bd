"""LoRA fine-tuning on one GPU: ours beside HF Trainer with PEFT and TRL, with and without compile.

    OVERTURE_DATA=... python benchmarks/gpu_finetune.py --shape 1b|8b [--windows 5] [--sides ...]
    OVERTURE_DATA=... python benchmarks/gpu_finetune.py --shape toy   # checks itself on a CPU

A model of Llama-3.2-1B's or Llama-3.1-8B's shape, freshly initialised (vocabulary 128,256, of which
GPT-2's ids occur), LoRA r=16 on all linear layers, Dolly packed into 4,096 tokens, bfloat16. The
share of the peak is that of the large matrix products of the same GPU. One side after the other,
each at its best batch size. Sides whose library is not installed are left out by name. Writes
benchmarks/results/gpu_finetune_<shape>.json, but for toy.
"""

import sys
from importlib.util import find_spec

from turns import measure_alone

LENGTH = 4096
LLAMA = {
    "vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32,
    "max_position_embeddings": LENGTH, "rope_theta": 500000.0,
}  # fmt: skip
SHAPES = {
    "1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "head_dim": 64, "tie_word_embeddings": True},
    "8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "head_dim": 128, "tie_word_embeddings": False},
    "toy": {**LLAMA, "vocab_size": 50304, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "tie_word_embeddings": True},
}  # fmt: skip
LIBRARIES = {
    "ours": {"library": "ours", "sizes": (8, 4, 1)},
    "ours with Liger's loss": {"library": "ours", "switch": "liger", "sizes": (8,)},
    "trl, packed": {"library": "trl", "packing": True, "sizes": (1, 2, 4)},
    "trl, packed, Liger": {"library": "trl", "packing": True, "liger": True, "sizes": (1, 2, 4)},
    "trl, by length": {"library": "trl", "by_length": True, "sizes": (4,)},
    "hf": {"library": "hf", "sizes": (4, 8)},
}
NEEDS = {"hf": "accelerate", "trl": "trl"}
SIDES = {
    name + (", compiled" if compiled else ""): {
        **options,
        "dtype": "bfloat16",
        "compile": compiled,
        "sizes": options["sizes"][:1] if compiled else options["sizes"],
    }
    for compiled in (False, True)
    for name, options in LIBRARIES.items()
    if find_spec(NEEDS.get(options["library"], "torch"))
    and ("iger" not in name or find_spec("liger_kernel"))
}

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] != ["--shape"] or arguments[1:2] not in ([s] for s in SHAPES):
        sys.exit("the first option must be --shape 1b, 8b or toy")
    shape, toy = arguments[1], arguments[1] == "toy"
    missing = {n for n, o in LIBRARIES.items() if n not in SIDES}
    print(f"not installed, so left out: {', '.join(sorted(missing)) or 'none'}", flush=True)
    if toy:
        SIDES = {name: {**side, "sizes": (1,)} for name, side in SIDES.items()}
    measure_alone(
        f"gpu_finetune_{shape}", __doc__, SIDES, SHAPES[shape], LENGTH, limit=90.0,
        results=not toy, arguments=arguments[2:],
    )  # fmt: skip
