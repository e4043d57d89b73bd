"""Cross-entropy over the tokens that count: logits exist only where there is a label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

LABEL_BUCKET = 256


def label_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, position, target) of every label, each [labels] int64.

    `labels` [rows, tokens] int64 names the token at its own place, -100 for none, as Hugging Face
    has it; it is predicted from the place before, so `position` is one to the left of it.
    """
    rows, positions = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    return rows, positions, labels[rows, positions + 1]


def cross_entropy_at(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the cross-entropy of each label, [labels] float32, in nats.

    Args:
        hidden: [labels, width], the last hidden states at the positions that predict a label.
        head: the output embedding, [width] -> [vocabulary].
        targets: [labels] int64.
        scale: factor on the logits, for the model families that scale them (Cohere, Granite).
        softcap: logits become softcap * tanh(logits / softcap), as Gemma 2 has it.
    """
    # A shape met for the first time costs a kernel compilation on a CPU, and the number of labels
    # differs from batch to batch: round it up, so that few shapes occur.
    count = len(targets)
    hidden = F.pad(hidden, (0, 0, 0, -count % LABEL_BUCKET))
    logits = head(hidden)[:count].float() * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


class TokenCrossEntropy(Metric):
    """Mean cross-entropy over all label tokens of an eval set, each sample counted once.

    Streaming repeats samples so that ranks get equal shares. Sums are kept per sample and divided
    by how often it was seen, so that the figure is the same on any number of ranks.
    """

    full_state_update = False

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        for name in ("losses", "labels", "seen"):
            zeros = torch.zeros(num_samples, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, token_losses: Tensor, rows: Tensor, sample_ids: Tensor) -> None:
        """Add a batch: token_losses [labels], rows [labels] into sample_ids [rows]."""
        owners = sample_ids[rows]
        self.losses.index_add_(0, owners, token_losses.to(self.losses.dtype))
        self.labels.index_add_(0, owners, torch.ones_like(token_losses, dtype=self.labels.dtype))
        self.seen.index_add_(0, sample_ids, torch.ones_like(sample_ids, dtype=self.seen.dtype))

    def compute(self) -> Tensor:
        """Return the mean, a scalar in nats per label token."""
        times = self.seen.clamp(min=1)
        return (self.losses / times).sum() / (self.labels / times).sum()
