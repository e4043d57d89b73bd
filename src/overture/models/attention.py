"""The one seam to attention kernels, and the proof that packed documents do not see each other."""

from __future__ import annotations

from typing import Any

import torch

from overture.errors import ConfigError


def choose_attention(wanted: str) -> str:
    """Return the transformers attention implementation for `model.attention`."""
    return "sdpa" if wanted == "auto" else wanted


@torch.no_grad()
def prove_isolation(model: Any, vocab_size: int) -> None:
    """Check on the model itself that two packed documents give the logits of separate ones.

    transformers builds the block-diagonal mask from restarting position_ids only for families that
    go through its attention interface; others would let documents leak into each other silently.

    Raises:
        ConfigError: the documents of this model see each other when packed.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (1, 24), generator=generator).to(model.device)
    positions = torch.cat([torch.arange(8), torch.arange(16)])[None].to(model.device)
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:]
        alone = model(input_ids=ids[:, 8:], position_ids=positions[:, 8:], use_cache=False).logits
    finally:
        model.train(was_training)
    difference = (packed - alone).abs().max().item()
    # A leak shifts logits by several times their own spread, rounding by a few steps of the type.
    bound = max(0.02, 16 * torch.finfo(alone.dtype).eps) * alone.float().std().item()
    if not difference <= bound:
        raise ConfigError(
            f"model.name: packed documents see each other in a {type(model).__name__} (logits "
            f"differ by {difference:.2g}); convert the data again with --packing none"
        )
