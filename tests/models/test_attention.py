"""Our attention against a float64 reference: values, gradients, isolation, every variation."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from overture.models.attention import BLOCK, NAME, Layout, attention, describe_attention

LENGTHS = {
    "one document": [[200]],
    "many, none at a block's edge": [[3, 130, 7, 50]],
    "padded, and another row": [[60, 90], [256]],
    "a block of padding": [[40], [5, 5]],
    "one token each": [[1] * 20],
}


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def starts_of(lengths, tokens):
    starts = torch.full((len(lengths), tokens), -1, dtype=torch.int32)
    for row, some in enumerate(lengths):
        place = 0
        for length in some:
            starts[row, place : place + length] = place
            place += length
    return starts


def reference(query, key, value, starts, scale, causal=True, window=None, softcap=None):
    """Return [rows, tokens, heads, size] in float64 from all scores at once, zeros for padding."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(starts[0]))[:, None] - torch.arange(len(starts[0]))
    sees = (starts[:, :, None] == starts[:, None]) & (starts >= 0)[:, :, None]
    if causal:
        sees &= distance >= 0
    if window is not None:
        sees &= distance.abs() < window
    shares = torch.softmax(scores.masked_fill(~sees[:, None], -torch.inf), -1)
    return (shares.nan_to_num() @ value).transpose(1, 2)


def inputs(rows, tokens, heads=4, groups=2, size=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((rows, tokens, n, size) for n in (heads, groups, groups))
    return [torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 6}, {"causal": False, "window": 9},
                {"softcap": 2.0}, {"route": "sdpa"}, {"route": "eager", "window": 6}], ids=str,
)  # fmt: skip
def test_equals_the_reference(lengths, options):
    tokens = max(BLOCK + 10, max(map(sum, lengths)))
    starts = starts_of(lengths, tokens)
    tensors = inputs(len(lengths), tokens)
    options = dict(options)
    route = options.pop("route", NAME)
    expected = reference(*tensors, starts, 0.3, **options)
    layer = Layer()
    layer.is_causal = options.get("causal", True)
    ours, _ = attention(
        layer, *tensors, starts[:, None, None, :], scaling=0.3,
        sliding_window=options.get("window"), softcap=options.get("softcap"), implementation=route,
    )  # fmt: skip
    real = starts >= 0
    torch.testing.assert_close(ours[real], expected[real])
    given = torch.randn_like(ours) * real[..., None, None]
    mine, theirs = (torch.autograd.grad(x, tensors, given) for x in (ours, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_close_to_the_reference_as_torchs_own(dtype):
    starts = starts_of([[70, 130]], 200)
    tensors = inputs(1, 200, dtype=dtype)
    exact = reference(*tensors, starts, 0.3)
    ours, _ = attention(Layer(), *tensors, starts[:, None, None, :], scaling=0.3)
    mask = Layout(starts, True, None).mask(torch.float32)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.repeat_interleave(4 // x.shape[1], 1) for x in tensors), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    given = torch.randn(exact.shape).to(dtype)
    routes = [
        (x, torch.autograd.grad(x, tensors, given.to(x.dtype))) for x in (exact, ours, theirs)
    ]
    errors = [
        [(a.double() - b.double()).abs().max().item() for a, b in
         zip((out, *grads), (routes[0][0], *routes[0][1]), strict=True)]
        for out, grads in routes[1:]
    ]  # fmt: skip
    for mine, torchs in zip(*errors, strict=True):
        assert mine <= 3 * torchs + 1e-6


def test_documents_do_not_see_each_other():
    starts = starts_of([[70, 130]], 200)
    tensors = inputs(1, 200)
    ours, _ = attention(Layer(), *tensors, starts[:, None, None, :])
    (of_key,) = torch.autograd.grad(ours[:, 70:].sum(), tensors[1], retain_graph=True)
    assert not of_key[:, :, :70].any()
    (of_query,) = torch.autograd.grad(ours[:, :70].sum(), tensors[0])
    assert not of_query[:, :, 70:].any()


def test_dropout_drops_shares_and_keeps_their_sum():
    starts = starts_of([[300]], 300)
    query, key, value = inputs(1, 300)
    value = torch.ones_like(value).requires_grad_()
    torch.manual_seed(1)
    ours, _ = attention(Layer(), query, key, value, starts[:, None, None, :], dropout=0.25)
    assert ours.mean().item() == pytest.approx(1.0, abs=0.02)
    assert ours.std().item() > 0.01
    # The gradient is that of the same draw: the output is linear in the values.
    (of_value,) = torch.autograd.grad(ours.sum(), value)
    assert (of_value * value).sum().item() == pytest.approx(ours.sum().item())


def test_boundaries_are_those_of_flash_attention():
    starts = starts_of([[3, 4], [8], [2, 1]], 8)
    assert Layout(starts, True, None).boundaries.tolist() == [0, 3, 7, 8, 16, 18, 19, 24]
    # Told how many there are, it asks no device, and comes to the same.
    assert Layout(starts, True, None, spans=7).boundaries.tolist() == [0, 3, 7, 8, 16, 18, 19, 24]


def test_masks_of_transformers_go_to_its_own_kernel():
    query, key, value = inputs(1, 6, dtype=torch.float32)
    ours, _ = attention(Layer(), query, key, value, None)
    exact = reference(query, key, value, torch.zeros(1, 6, dtype=torch.int32), 8**-0.5)
    torch.testing.assert_close(ours, exact.float())
    last, _ = attention(Layer(), query[:, :, -1:], key, value, None)  # after a cache
    torch.testing.assert_close(last, exact[:, -1:].float())


def test_the_route_is_named():
    def said(device, **more):
        config = LlamaConfig(**more, attn_implementation=NAME)
        return describe_attention(SimpleNamespace(config=config), device)

    assert said("cpu") == f"attention: within documents, in blocks of {BLOCK} queries"
    assert "all scores of a row at once" in said("cpu", attn_logit_softcapping=30.0)
    assert "SDPA with a mask" in said("gpu")
    config = LlamaConfig(attn_implementation="eager")
    assert describe_attention(SimpleNamespace(config=config), "cpu") == "attention: eager"
