"""Rows of unequal length to their tokens end to end, so that nothing is computed on padding."""

from typing import NamedTuple

import torch
from torch import Tensor

from overture.models.attention import mask_of

# Totals are multiples of it, filled up with padding: a CPU builds kernels for every new shape.
STEP = 64


class Unpadded(NamedTuple):
    """Where the tokens of a batch of [rows, tokens] are, of which all or some are computed on."""

    shape: tuple[int, int]
    mask: Tensor  # for attention
    places: Tensor | None  # [total] int64 of the tokens in the rows end to end; None for all
    num_tokens: int  # of `places`; behind them stands padding

    def take(self, values: Tensor) -> Tensor:
        """Return [1, total] of [rows, tokens], or what was given where all are computed on."""
        return values if self.places is None else values.flatten()[self.places][None]

    def put_back(self, hidden: Tensor) -> Tensor:
        """Return [rows, tokens, width], zeros for padding, of [1, total, width]."""
        if self.places is None:
            return hidden
        rows, tokens = self.shape
        padded = hidden.new_zeros(rows * tokens, hidden.shape[-1])
        places, states = self.places[: self.num_tokens], hidden[0, : self.num_tokens]
        return padded.index_copy(0, places, states).view(rows, tokens, -1)


def keep_padding(starts: Tensor, spans: int | None = None) -> Unpadded:
    """Return that all of [rows, tokens] `starts` is computed on; `spans` is of `document_mask`."""
    return Unpadded(tuple(starts.shape), mask_of(starts, spans), None, starts.numel())


def unpad(starts: Tensor, num_tokens: int | None, num_documents: int | None) -> Unpadded:
    """Return that the tokens alone are computed on, end to end, and less than STEP of padding: all
    of it, where there is no more.

    Args:
        starts: [rows, tokens] int32, where the document of each token begins, -1 for padding.
        num_tokens, num_documents: how many there are, so that no GPU has to be asked.
    """
    rows, tokens = starts.shape
    is_token, counted = starts >= 0, num_tokens is not None
    num_tokens = num_tokens if counted else int(is_token.sum())
    total = -(-num_tokens // STEP) * STEP
    filled = rows * tokens
    # Ours is behind the tokens; kept before or between them, it would count in distances.
    if total >= filled and (counted or not (is_token[:, 1:] & ~is_token[:, :-1]).any()):
        return keep_padding(starts, num_documents if num_tokens == filled else None)
    is_token, total = is_token.flatten(), min(total, filled)
    places = is_token.to(torch.uint8).argsort(descending=True, stable=True)[:total]
    number = is_token.cumsum(0) - 1  # of each token among all of them
    begins = starts + torch.arange(rows, device=starts.device)[:, None] * tokens
    begins = number[begins.flatten()[places[:num_tokens]]].to(torch.int32)
    begins = torch.nn.functional.pad(begins, (0, total - num_tokens), value=-1)
    spans = None if num_documents is None else num_documents + (total > num_tokens)
    mask = mask_of(begins[None], spans, max(tokens, STEP))
    return Unpadded((rows, tokens), mask, places, num_tokens)


def starts_of(attention_mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Return [rows, tokens] int32, as in batches of ours, of a mask as Hugging Face has it.

    Such a mask is [rows, tokens], 1 where there is a token, or None where all are. Where rows are
    computed on end to end, what it hides between tokens is taken out, so that these are neighbours.
    Raises ValueError for other shapes.
    """
    if attention_mask is None:
        return torch.zeros(shape, dtype=torch.int32)
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}, expected {list(shape)}")
    is_token = attention_mask.bool()
    first = is_token.to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(is_token, first, -1).to(torch.int32)
