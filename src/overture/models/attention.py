"""The one seam to attention kernels: documents of a packed row never see each other.

Batches carry, in place of an attention mask, where the document of each token begins: a `[rows, 1,
1, tokens]` int32 tensor that transformers hands through to every layer untouched. Each kernel makes
of it what it needs. Calls with an ordinary mask, or none, such as those of generation with a cache,
go to transformers' own SDPA.

On a CPU the kernel is ours. torch's SDPA takes one document at a time there and runs small products
at a fraction of the machine's speed. Here a row is divided into fixed blocks of queries; each meets
the keys from the start of its first document on, so that few shapes ever occur and matrix products
of useful size do the work, as in FlashAttention (Dao et al. 2022, 2205.14135), but with the
probabilities kept for the backward pass. On CUDA it is FlashAttention's own varlen kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

NAME = "overture"
BLOCK = 128  # queries per block; 64 and 256 were slower on packed Dolly at 1,024 tokens

# Rows, begin and end of the queries, low and high of the keys, and what is added to the scores:
# [rows, 1 or heads, queries, keys].
_Block = tuple[slice | Tensor, int, int, int, int, Tensor]


def choose_attention(wanted: str, model_class: Any, pairs: bool = False) -> str:
    """Return the transformers attention implementation for `model.attention`.

    Families that bypass transformers' attention interface cannot use ours; nor do encoder-decoders,
    whose `pairs` are never packed: on a CPU torch's kernel takes twice as long for these as none.
    """
    if wanted != "auto" or (pairs and not torch.cuda.is_available()):
        return "eager" if wanted == "auto" else wanted
    has_sdpa = getattr(model_class, "_supports_sdpa", False)  # no sinks and the like
    if has_sdpa and not pairs and getattr(model_class, "_supports_attention_backend", False):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        return NAME
    return "sdpa" if has_sdpa else "eager"


def hide_from_compiler() -> None:
    """Keep torch.compile out of ours: blocks follow from documents, every batch is a new graph."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, torch.compiler.disable(attention))


def describe_attention(model: Any, device: str) -> str:
    """Return one line on the kernels that a model on a device (`gpu`, `cpu`) will use."""
    name = model.config._attn_implementation
    if name != NAME:
        return f"attention: {name}"
    if getattr(model.config, "attn_logit_softcapping", None):
        return "attention: within documents, all scores of a row at once, for their soft cap"
    if device == "cpu":
        return f"attention: within documents, in blocks of {BLOCK} queries"
    return f"attention: within documents, {_varlen_kernel()[0]} where it can, else SDPA with a mask"


def document_mask(
    model: Any, starts: Tensor, spans: int | None = None, longest: int | None = None
) -> Tensor | None:
    """Return what to give a model as `attention_mask`, None where its attention is not ours.

    Args:
        model: of transformers.
        starts: [rows, tokens] int32, where in its row the document of each token begins, -1 for
            padding.
        spans: how many documents and ends of padding there are, so that no GPU has to be asked.
        longest: bounds the tokens of one of these, so that no block of a kernel looks for more.
    """
    return mask_of(starts, spans, longest) if model.config._attn_implementation == NAME else None


def mask_of(starts: Tensor, spans: int | None = None, longest: int | None = None) -> Tensor:
    """Return the mask of `document_mask`."""
    mask = starts[:, None, None, :]
    mask.__dict__.update(spans=spans, longest=longest or starts.shape[1])
    return mask


def takes_rows_end_to_end(implementation: str, device: torch.device, dtype: Any, size: int) -> bool:
    """Return whether our kernels take all rows as one, with ALiBi and heads of `size`, without a
    mask as large as the square of all their tokens.
    """
    on_gpu = device.type == "cuda" and _fits_varlen(dtype, size, alibi=True)
    return implementation == NAME and (device.type == "cpu" or on_gpu)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, slopes: tuple[float, ...] | None = None,
    implementation: str = NAME, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return [rows, tokens, heads, size], attended within documents, as transformers calls it.

    Args:
        module: the attention layer; `is_causal` says whether later tokens are hidden.
        query: [rows, heads, tokens, size].
        key, value: [rows, key-value heads, tokens, size].
        attention_mask: of `document_mask`, or a mask of transformers' own.
        dropout: share of the probabilities that are dropped.
        scaling: of the scores; default 1 / sqrt(size).
        sliding_window: how many tokens back, itself included, a token sees.
        softcap: scores become softcap * tanh(scores / softcap).
        slopes: of ALiBi, one for each head: scores fall by slope * distance.
        implementation: `sdpa` or `eager` for torch's kernel or none, with the mask written out.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = scaling
    if scaling is None:  # GPT-2 leaves its own rules to its eager attention
        scale = query.shape[-1] ** -0.5 if getattr(module, "scale_attn_weights", True) else 1.0
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):
            scale /= module.layer_idx + 1
    causal = kwargs.pop("is_causal", None)
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        # Not the argument: families set it to say that a mask is there.
        is_causal = getattr(module, "is_causal", True)
        layout = _layout(attention_mask, is_causal, sliding_window, slopes)
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # our kernels are no operators that it knows
            dtype = torch.get_autocast_dtype(kind)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        usual = implementation == NAME and not softcap and value.shape[-1] == query.shape[-1]
        size = query.shape[-1]
        if usual and kind == "cuda" and _fits_varlen(query.dtype, size, bool(slopes), dropout > 0):
            return _varlen(query, key, value, layout, scale, dropout), None
        if usual and kind == "cpu":
            with torch.autocast(kind, enabled=False):
                return BlockAttention.apply(query, key, value, layout, scale, dropout), None
        attention_mask, causal = layout.mask(query.dtype), None
    if softcap or implementation == "eager":
        return _spelled_out(query, key, value, attention_mask, scale, softcap, dropout), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scale, causal, **kwargs
    )


def _spelled_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float,
    softcap: float | None, dropout: float,
) -> Tensor:  # fmt: skip
    """Return attention also with capped scores, which no kernel of torch's has."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:  # one query after a cache sees all; more of them are a prompt
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        mask = mask.tril() if len(mask) > 1 else mask
    if mask.dtype == torch.bool:
        # Not -inf: a padded query may see nothing, and its NaN would reach others later.
        least = torch.finfo(scores.dtype).min / 2
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, least)
    exact = torch.promote_types(scores.dtype, torch.float32)
    shares = torch.softmax(scores + mask[..., : scores.shape[-1]], -1, exact)
    shares = torch.nn.functional.dropout(shares.to(value.dtype), dropout)
    return (shares @ value).transpose(1, 2).contiguous()


@cache
def _varlen_kernel() -> tuple[str, Any]:
    """Return the name and the function of the best FlashAttention varlen kernel there is."""
    try:
        from flash_attn import flash_attn_varlen_func

        return "flash-attn's varlen kernel", flash_attn_varlen_func
    except ImportError:
        return "torch's own FlashAttention kernel", torch.ops.aten._flash_attention_forward


def _fits_varlen(dtype: torch.dtype, size: int, alibi: bool, drops: bool = False) -> bool:
    """Return whether FlashAttention's kernels take such heads, of this type, on this device."""
    if alibi and not _varlen_kernel()[0].startswith("flash-attn"):  # torch's has no gradient of it
        return False
    half, capability = dtype in (torch.bfloat16, torch.float16), torch.cuda.get_device_capability()
    # The backward pass of these has no room on smaller cards (8.6, 8.9, 12.0).
    wide = 192 < size <= 224 or (size > 192 and drops)
    fits = size <= 256 and not (wide and capability not in ((8, 0), (9, 0), (10, 0), (10, 3)))
    return half and size % 8 == 0 and fits and capability >= (8, 0)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float
) -> Tensor:
    """Return [rows, tokens, heads, size] from FlashAttention's varlen kernel."""
    rows, heads, tokens, size = query.shape
    flat = [x.transpose(1, 2).reshape(rows * tokens, -1, size) for x in (query, key, value)]
    ends, causal, longest = layout.boundaries, layout.causal, layout.longest
    left = -1 if layout.window is None else layout.window - 1
    right = 0 if causal else left
    name, kernel = _varlen_kernel()
    if name.startswith("flash-attn"):
        out = kernel(
            *flat, ends, ends, longest, longest, dropout_p=dropout, softmax_scale=scale,
            causal=causal, window_size=(left, right), alibi_slopes=layout.slopes,
        )  # fmt: skip
    else:
        window = {} if left < 0 else {"window_size_left": left, "window_size_right": right}
        out = kernel(
            *flat, ends, ends, longest, longest, dropout, causal, False, scale=scale, **window
        )[0]
    return out.view(rows, tokens, heads, size)


class Layout:
    """Which tokens of a batch see each other: if `causal`, none sees a later one.

    `starts`, `spans` and `longest` are those of `document_mask`, `window` (None for all) and
    `slopes` (None for none) those of `attention`.
    """

    def __init__(
        self, starts: Tensor, causal: bool, window: int | None = None,
        slopes: tuple[float, ...] | None = None, spans: int | None = None,
        longest: int | None = None,
    ) -> None:  # fmt: skip
        self.starts, self.causal, self.window, self.spans = starts, causal, window, spans
        self.slopes = None if slopes is None else torch.tensor(slopes, device=starts.device)
        self.longest = longest or starts.shape[1]
        self._blocks: dict[torch.dtype, list[_Block]] = {}
        self._masks: dict[torch.dtype, Tensor] = {}

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return [rows, 1, tokens, tokens] bool, True where a query (third) sees a key (last); on a
        GPU, and with ALiBi, [rows, heads, tokens, tokens], what is added to scores: of a bool
        torch's kernel would make that in each layer anew, and keep it for the backward pass.
        """
        if dtype not in self._masks:
            places = torch.arange(self.starts.shape[1], device=self.starts.device)
            sees = self._sees(self.starts, places, places)[:, None]
            is_plain = self.slopes is None and not sees.is_cuda
            self._masks[dtype] = sees if is_plain else self._bias(sees, places, places, dtype)
        return self._masks[dtype]

    def _bias(self, sees: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [rows, 1, queries, keys], with ALiBi [rows, heads, ...], -inf where none sees."""
        bias = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        if self.slopes is not None:
            distances = (queries[:, None] - keys).abs()
            falling = (-self.slopes[:, None, None] * distances).to(dtype)
            bias = falling.expand(len(sees), *falling.shape)
        return bias.masked_fill(~sees, -torch.inf)

    @cached_property
    def boundaries(self) -> Tensor:
        """Return where documents begin in all rows end to end, and their end, [documents + 1]."""
        rows, tokens = self.starts.shape
        offsets = torch.arange(rows, device=self.starts.device)[:, None] * (tokens + 1)
        owner = (self.starts + offsets).flatten()
        first = torch.nn.functional.pad(owner[1:] != owner[:-1], (1, 0), value=True)
        spans = int(first.sum()) if self.spans is None else self.spans
        begins = first.to(torch.uint8).argsort(descending=True, stable=True)[:spans]
        return torch.nn.functional.pad(begins, (0, 1), value=rows * tokens).to(torch.int32)

    def _sees(self, starts: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Return [..., queries, keys] bool within rows of `starts` [..., tokens]."""
        sees = starts[..., queries, None] == starts[..., None, keys]
        if self.causal:
            sees &= keys <= queries[:, None]
        if self.window is not None:
            sees &= (queries[:, None] - keys).abs() < self.window
        return sees

    def blocks(self, dtype: torch.dtype) -> list[_Block]:
        """Return the blocks of queries, each with the keys that it meets, rows alike together."""
        if dtype not in self._blocks:
            alike: dict[tuple[int, ...], list[int]] = {}
            for row, first in enumerate(self.starts.tolist()):
                for span in self._spans(first):
                    alike.setdefault(span, []).append(row)
            self._blocks[dtype] = [self._block(rows, *span, dtype) for span, rows in alike.items()]
        return self._blocks[dtype]

    def _spans(self, first: list[int]) -> Iterator[tuple[int, int, int, int]]:
        """Yield (begin, end) of the queries and (low, high) of the keys of a row's blocks."""
        length = len(first)
        for begin in range(0, length, BLOCK):
            if first[begin] < 0:  # padding from here on
                return
            end = min(begin + BLOCK, length)
            low, high = first[begin], end
            if self.window is not None:
                low = max(low, begin - self.window + 1)
            if not self.causal:  # to the end of the last token's document
                high = length - first[::-1].index(first[end - 1])
                high = min(-(-high // BLOCK) * BLOCK, length)
            # Few widths, so that kernels are built once.
            yield begin, end, low // BLOCK * BLOCK, high

    def _block(
        self, rows: list[int], begin: int, end: int, low: int, high: int, dtype: torch.dtype
    ) -> _Block:
        places = torch.arange(self.starts.shape[1])
        adjacent = rows[-1] - rows[0] == len(rows) - 1
        chosen = slice(rows[0], rows[-1] + 1) if adjacent else torch.tensor(rows)
        sees = self._sees(self.starts[chosen], places[begin:end], places[low:high])[:, None]
        bias = self._bias(sees, places[begin:end], places[low:high], dtype)
        return chosen, begin, end, low, high, bias


def _layout(starts: Tensor, *key: Any) -> Layout:
    """Return the layout that belongs to a mask of `document_mask`, made once for all layers; `key`
    is whether it is causal, its window and its slopes.
    """
    known = starts.__dict__.setdefault("layouts", {})
    if key not in known:
        more = {name: starts.__dict__.get(name) for name in ("spans", "longest")}
        known[key] = Layout(starts[:, 0, 0], *key, **more)
    return known[key]


class BlockAttention(torch.autograd.Function):
    """Attention within documents, block by block; takes and returns what `attention` does."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        """Return [rows, tokens, heads, size], zeros for padding."""
        rows, heads, tokens, size = query.shape
        groups = key.shape[1]
        out = query.new_zeros(rows, tokens, heads, size)
        kept = []
        for at, begin, end, low, high, bias in layout.blocks(query.dtype):
            # Query heads that share a key-value head are further rows of one matrix product.
            batch = len(bias) * groups
            scaled = (query[at, :, begin:end] * scale).reshape(batch, -1, size)
            keys = key[at, :, low:high].reshape(batch, -1, size)
            scores = torch.bmm(scaled, keys.transpose(1, 2))
            scores.view(len(bias), heads, end - begin, high - low).add_(bias)
            shares = torch.softmax(scores, -1)
            used = shares
            if dropout:
                noise = torch.empty_like(shares).bernoulli_(1 - dropout).div_(1 - dropout)
                used = shares * noise
                kept.append(noise)
            mixed = torch.bmm(used, value[at, :, low:high].reshape(batch, -1, size))
            out[at, begin:end] = mixed.view(len(bias), heads, -1, size).transpose(1, 2)
            kept.append(shares)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale, ctx.dropout = layout, scale, dropout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        rows, heads, tokens, size = query.shape
        groups = key.shape[1]
        # Laid out as the projections are, so that transposing back costs nothing.
        of_query = query.new_zeros(rows, tokens, heads, size).transpose(1, 2)
        # Blocks add up here, hence at least float32.
        exact = torch.promote_types(key.dtype, torch.float32)
        of_key = key.new_zeros(rows, tokens, groups, size, dtype=exact).transpose(1, 2)
        of_value = torch.zeros_like(of_key)
        saved = iter(kept)
        for at, begin, end, low, high, bias in ctx.layout.blocks(query.dtype):
            batch = len(bias) * groups
            noise = next(saved) if ctx.dropout else None
            shares = next(saved)
            given = gradient[at, begin:end].transpose(1, 2).reshape(batch, -1, size)
            values = value[at, :, low:high].reshape(batch, -1, size)
            of_shares = torch.bmm(given, values.transpose(1, 2))
            if noise is not None:
                of_shares *= noise
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            keys = key[at, :, low:high].reshape(batch, -1, size)
            to_query = torch.bmm(of_scores, keys).mul_(ctx.scale)
            of_query[at, :, begin:end] = to_query.view(len(bias), heads, -1, size)
            scaled = (query[at, :, begin:end] * ctx.scale).reshape(batch, -1, size)
            to_key = torch.bmm(of_scores.transpose(1, 2), scaled)
            of_key[at, :, low:high] += to_key.view(len(bias), groups, -1, size)
            used = shares if noise is None else shares * noise
            to_value = torch.bmm(used.transpose(1, 2), given)
            of_value[at, :, low:high] += to_value.view(len(bias), groups, -1, size)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None
