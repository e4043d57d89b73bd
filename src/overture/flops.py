"""Arithmetic of training, and what devices can do: the two halves of model FLOP utilisation.

Matrix products cost 2 FLOPs per weight and token forward, and twice that backward: 6N per token
when every weight is trained (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). A frozen weight
needs no gradient of its own, so its backward pass is half: 4N with LoRA, whose own weights are
left out as they are below one percent. Attention adds 2 products of [tokens, tokens, width] per
layer: 4 x length x width FLOPs per token forward, half of that under a causal mask, three times it
with the backward pass (PaLM, arXiv 2204.02311, appendix B). The output head counts at label tokens
only, since there are no other logits.
"""

import re

# Dense bfloat16 peaks in FLOP/s from the makers' data sheets, by a word of the device's name.
BF16_PEAK = {
    "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "A10G": 70e12,
}  # fmt: skip


def training_flops(
    weights: int,  # parameters that take part in matrix products at every token (no embedding)
    head: int,  # those of the output embedding, which is multiplied at label tokens only
    frozen: bool,  # true where almost all of them are frozen, as with LoRA
    tokens: int,  # real tokens in the step
    labels: int,  # label tokens in the step
    layers: int,  # with attention
    width: int,  # of the attention, heads times head size
    squares: float,  # sum over the documents of their lengths squared
) -> float:
    """Return the FLOPs of one training step's forward and backward pass."""
    products = (4 if frozen else 6) * (weights * tokens + head * labels)
    return products + 3 * (4 * squares * width / 2) * layers


def peak_flops(device_name: str) -> float | None:
    """Return a device's dense bfloat16 peak in FLOP/s, or None where it is not known."""
    known = BF16_PEAK.items()
    return next((p for name, p in known if re.search(rf"\b{name}\b", device_name)), None)
