"""Cross-entropy over the tokens that count: logits exist only at labels, and a few at a time.

The gradient of the hidden states is made in the forward pass, while the logits of a chunk are at
hand, so that no logits are ever kept: memory does not grow with vocabulary times length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

# Rows of logits at a time. On a CPU they stay within its last-level cache (128 x 50,257 in float32
# is 26 MB); on a GPU, or where the head is trained as well, larger products pay.
CHUNK = 128
LARGE_CHUNK = 1024


def label_positions(labels: Tensor, count: int, ahead: int = 1) -> tuple[Tensor, Tensor]:
    """Return (place, target) of every label, each [labels, up to a multiple of CHUNK] int64.

    `labels` [rows, tokens] int64 names the token at its own place, -100 for none, as Hugging Face
    has it; it is predicted from the place before, so `place`, which counts through the rows end to
    end, is one to the left of it, or none (`ahead` of 0) in a masked language model. Behind the
    `count` labels stand places without one, so that few shapes occur. No device has to be waited
    for, as it would be with torch.nonzero.
    """
    wanted = F.pad(labels[:, ahead:] != -100, (0, ahead)).flatten()
    room = -(-count // CHUNK) * CHUNK
    places = wanted.to(torch.uint8).argsort(descending=True, stable=True)[:room]
    return places, labels.flatten().roll(-ahead)[places].clamp_(min=0)


def cross_entropy_at(
    hidden: Tensor, head: Any, targets: Tensor, scale: float = 1.0, softcap: float | None = None,
    count: int | None = None, smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sum of the labels' cross-entropies, and each of them without gradient, in nats.

    Args:
        hidden: [room, width], the last hidden states at the positions that predict a label.
        head: the output embedding, [width] -> [vocabulary], with the `weight` and `bias` of an
            nn.Linear.
        targets: [room] int64.
        scale: factor on the logits, for the model families that scale them (Cohere, Granite).
        softcap: logits become softcap * tanh(logits / softcap), as Gemma 2 has it.
        count: how many of them are labels, the others standing behind; default: all.
        smoothing: share of the truth that is spread over the vocabulary evenly.

    Returns:
        (scalar, [count]), both of float32 or the wider type of `hidden`.
    """
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # inside, a weight that requires a gradient would be given one
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    chunk = LARGE_CHUNK if weight.requires_grad or hidden.is_cuda else CHUNK
    count = len(hidden) if count is None else count
    rules = scale, softcap, smoothing, chunk, count
    return _CrossEntropy.apply(hidden, weight, bias, targets, *rules)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        scale: float, softcap: float | None, smoothing: float, chunk: int, count: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        # A shape met for the first time costs a kernel compilation on a CPU, hence few of them.
        room = len(hidden)
        rows = F.pad(hidden.to(dtype), (0, 0, 0, -room % CHUNK))
        targets = F.pad(targets, (0, -room % CHUNK))
        chunk = max(min(chunk, len(rows)), 1)
        weight, types = weight.to(dtype), (hidden.dtype, weight.dtype)
        losses = hidden.new_empty(len(rows), dtype=exact)
        wanted = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(rows) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=exact) if wanted[2] else None
        # Made once: new memory of this size would cost more than the arithmetic in it.
        narrow_room = rows.new_empty(chunk, len(weight))
        logits_room = torch.empty_like(narrow_room, dtype=exact)
        # On a CPU, where the kernel goes element by element, in the place of the logits.
        apart = softcap or kind != "cpu"
        kept = narrow_room, logits_room, torch.empty_like(logits_room) if apart else logits_room
        with torch.autocast(kind, enabled=False):
            for begin in range(0, len(rows), chunk):
                part, ids = rows[begin : begin + chunk], targets[begin : begin + chunk, None]
                narrow, logits, shares = (x[: len(part)] for x in kept)
                logits.copy_(torch.mm(part, weight.t(), out=narrow))
                if bias is not None:
                    logits += bias
                if scale != 1:
                    logits *= scale
                if softcap:
                    logits.div_(softcap).tanh_().mul_(softcap)
                # log(sum(exp)) from the greatest logit and its share, which is never small.
                most, place = logits.max(-1, keepdim=True)
                truth = logits.gather(1, ids)
                if smoothing:  # a line through the logits, as the truth is
                    truth = torch.lerp(truth, logits.mean(-1, keepdim=True), smoothing)
                torch._softmax(logits, -1, False, out=shares)
                logsum = most - shares.gather(1, place).log()
                losses[begin : begin + chunk] = (logsum - truth)[:, 0]
                if not any(wanted):
                    continue
                step = shares  # of the loss along the logits: what is predicted less the truth
                if smoothing:
                    step -= smoothing / len(weight)
                step.scatter_add_(1, ids, step.new_full(ids.shape, smoothing - 1))
                if begin + chunk > count:
                    step[max(count - begin, 0) :] = 0
                if softcap:
                    step *= 1 - (logits / softcap) ** 2
                if scale != 1:
                    step *= scale
                if of_bias is not None:
                    of_bias += step.sum(0)
                narrow.copy_(step)
                if of_hidden is not None:
                    torch.mm(narrow, weight, out=of_hidden[begin : begin + chunk])
                if of_weight is not None:
                    of_weight += torch.mm(narrow.t(), part)
        ctx.types = types
        of_hidden = None if of_hidden is None else of_hidden[:room]
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        losses = losses[:count]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, given: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        grads = [None if x is None else x * given for x in (of_hidden, of_weight, of_bias)]
        for i, dtype in enumerate(ctx.types):
            grads[i] = None if grads[i] is None else grads[i].to(dtype)
        return (*grads, *[None] * 6)


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
