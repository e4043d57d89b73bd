"""FlashAttention of rows end to end, as torch's own CUDA operators give it, written out plainly."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, _: Tensor, longest: int, *args: Any,
    scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **kwargs: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the output [tokens, heads, size] and four tensors for the backward pass.

    Queries are [tokens, heads, size], bfloat16 or float16; keys and values may have fewer heads.
    `ends` [documents + 1] int32, from 0, says where each begins, and none is over `longest`.
    """
    from stand_in_kernels import on_cpu, on_gpu

    assert query.dtype in (torch.bfloat16, torch.float16) and ends.dtype == torch.int32
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    _, dropout, causal, *_ = args
    assert not dropout, "dropout is left out here"
    rows = [on_cpu(x) for x in (query, key, value, ends)]
    out = torch.zeros(query.shape)
    window = window_size_left, 0 if causal else window_size_right
    for part, q, k, v in _documents(*rows, longest):
        weights = _scores(q, k, scale, window).softmax(-1)
        out[part] = torch.einsum("hqk,khd->qhd", weights, v)
    rest = (torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.int64),
            torch.zeros((), dtype=torch.int64), torch.zeros(0))  # fmt: skip
    return on_gpu(out.to(query.dtype)), *map(on_gpu, rest)


def flash_backward(
    given: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    ends: Tensor, _: Tensor, longest: int, *args: Any, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of queries, keys and values, of their shapes."""
    from stand_in_kernels import on_cpu, on_gpu

    _, dropout, causal, *_ = args
    assert not dropout, "dropout is left out here"
    rows, given = [on_cpu(x) for x in (query, key, value, ends)], on_cpu(given).float()
    gradients = [torch.zeros(x.shape) for x in rows[:3]]
    scale = scale or query.shape[-1] ** -0.5
    window = window_size_left, 0 if causal else window_size_right
    for part, q, k, v in _documents(*rows, longest):
        weights = _scores(q, k, scale, window).softmax(-1)
        of_weights = torch.einsum("qhd,khd->hqk", given[part], v)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        gradients[0][part] = torch.einsum("hqk,khd->qhd", of_scores, k) * scale
        of_key = torch.einsum("hqk,qhd->khd", of_scores, q) * scale
        of_value = torch.einsum("hqk,qhd->khd", weights, given[part])
        for gradient, each in zip(gradients[1:], (of_key, of_value), strict=True):
            shape = len(each), gradient.shape[1], -1, each.shape[-1]
            gradient[part] = each.view(shape).sum(2)
    return tuple(on_gpu(x.to(query.dtype)) for x in gradients)


def _documents(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int) -> Iterator:
    """Yield where each document is, and its queries, keys and values in float32."""
    ends = ends.tolist()
    assert ends[0] == 0 and ends[-1] <= len(query) and ends == sorted(ends), ends
    times = query.shape[1] // key.shape[1]
    for begin, end in pairwise(ends):
        assert end - begin <= longest, f"{end - begin} tokens, of at most {longest}"
        if begin < end:
            part = slice(begin, end)
            k, v = (x[part].float().repeat_interleave(times, 1) for x in (key, value))
            yield part, query[part].float(), k, v


def _scores(query: Tensor, key: Tensor, scale: float | None, window: tuple) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    ahead = torch.arange(len(key)) - torch.arange(len(query))[:, None]
    left, right = window
    unseen = torch.zeros_like(ahead, dtype=torch.bool)
    if left is not None and left >= 0:
        unseen |= ahead < -left
    if right is not None and right >= 0:
        unseen |= ahead > right
    return scores.masked_fill(unseen, float("-inf"))


OPERATORS = {
    "_flash_attention_forward": flash_forward, "_flash_attention_backward": flash_backward,
}  # fmt: skip
