"""The loss against torch's own in float64, and the eval metric on any number of ranks."""

import resource

import pytest
import torch
import torch.nn.functional as F

from overture.callbacks.throughput import measured_peak
from overture.flops import peak_flops
from overture.models.loss import TokenCrossEntropy, cross_entropy_at, label_positions


def test_positions_are_one_left_of_the_label():
    labels = torch.tensor([[-100, 5, -100, 7], [-100, -100, -100, -100], [3, -100, 4, -100]])
    places, targets = label_positions(labels, 3)
    # The 3 in column 0 has nothing before it that could predict it.
    assert list(zip(places.tolist(), targets.tolist(), strict=True))[:3] == [(0, 5), (2, 7), (9, 4)]


def test_few_shapes_occur_and_what_fills_them_up_counts_for_nothing():
    torch.manual_seed(0)
    labels = torch.full((2, 200), -100)
    labels[:, 1:66] = torch.randint(0, 40, (2, 65))
    places, targets = label_positions(labels, 130)
    assert places.shape == targets.shape == (256,)
    head = torch.nn.Linear(12, 40).double()
    states = torch.randn(400, 12, dtype=torch.float64, requires_grad=True)
    total, losses = cross_entropy_at(states[places], head, targets, count=130)
    logits = head(states).view(2, 200, -1)[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum")
    assert losses.shape == (130,)
    torch.testing.assert_close(total, expected)
    for parameter in (states, head.weight, head.bias):
        ours, theirs = (
            torch.autograd.grad(x, parameter, retain_graph=True)[0] for x in (total, expected)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 300, 1300])
@pytest.mark.parametrize(
    ("scale", "softcap", "smoothing", "bias", "trained"),
    [
        (1.0, None, 0.0, False, False), (0.25, None, 0.0, True, True), (1.0, 5.0, 0.0, False, True),
        (0.5, None, 0.1, True, True), (1.0, 5.0, 0.3, False, True),
    ],
)  # fmt: skip
def test_equals_torch_in_float64(count, scale, softcap, smoothing, bias, trained):
    torch.manual_seed(0)
    head = torch.nn.Linear(12, 40, bias=bias).double().requires_grad_(trained)
    hidden = torch.randn(count, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 40, (count,))
    options = {"scale": scale, "softcap": softcap, "smoothing": smoothing}
    total, losses = cross_entropy_at(hidden, head, targets, **options)
    assert losses.shape == (count,)
    assert not losses.requires_grad
    logits = head(hidden) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    wanted = [hidden, *(head.parameters() if trained else ())]
    ours, theirs = (torch.autograd.grad(3 * x, wanted) for x in (total, expected.sum()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    if count == 300 and softcap:
        assert torch.autograd.gradcheck(
            lambda h: cross_entropy_at(h, head, targets[:5], **options)[0],
            hidden[:5].detach().requires_grad_(),
        )


def test_half_precision_sums_in_float32():
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False)
    hidden = torch.randn(256, 64)
    targets = torch.randint(0, 1000, (256,))
    exact, _ = cross_entropy_at(hidden, head, targets)
    half, losses = cross_entropy_at(hidden.bfloat16(), head.bfloat16(), targets)
    assert (half.dtype, losses.dtype) == (torch.float32, torch.float32)
    assert half.item() == pytest.approx(exact.item(), rel=2e-3)


def test_a_chunk_of_logits_exists_once_in_float32(monkeypatch):
    """The shares take the place of the logits, to the same bits as beside them."""
    made, torchs = [], torch._softmax

    def softmax(logits: torch.Tensor, *rest: object, out: torch.Tensor) -> None:
        expected = torchs(logits.clone(), *rest)
        torchs(logits, *rest, out=out)
        made.append(out.data_ptr() == logits.data_ptr() and torch.equal(out, expected))

    monkeypatch.setattr(torch, "_softmax", softmax)
    head = torch.nn.Linear(16, 1031, bias=False).bfloat16()
    cross_entropy_at(10 * torch.randn(256, 16).bfloat16(), head, torch.arange(256))
    assert made
    assert all(made)


def test_memory_does_not_grow_with_vocabulary_times_length():
    """The logits of these labels alone would fill 1.6 GB."""
    head = torch.nn.Linear(16, 100_000, bias=False).requires_grad_(False)
    hidden = torch.randn(4096, 16, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cross_entropy_at(hidden, head, torch.zeros(4096, dtype=torch.long))[0].backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_metric_is_token_weighted_and_counts_a_repeated_sample_once():
    losses = {0: [1.0, 3.0], 1: [2.0], 2: [5.0, 6.0, 7.0]}

    def fed(*samples: int) -> TokenCrossEntropy:
        metric = TokenCrossEntropy(3)
        for sample in samples:  # one batch each
            values = torch.tensor(losses[sample])
            metric.update(
                values, torch.zeros(len(values), dtype=torch.long), torch.tensor([sample])
            )
        return metric

    assert fed(0, 1, 2).compute().item() == pytest.approx(24 / 6)
    assert fed(0, 1, 2, 2, 0).compute().item() == pytest.approx(24 / 6)


def test_metric_takes_batches_of_several_samples():
    metric = TokenCrossEntropy(5)
    metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1]), torch.tensor([4, 2]))
    assert metric.compute().item() == pytest.approx(2.0)
    assert metric.labels.tolist() == [0, 0, 2, 0, 1]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("Tesla T4", None), ("NVIDIA RTX A1000", None), ("NVIDIA GH200 480GB", 989e12),
    ],
)  # fmt: skip
def test_peaks_are_those_of_data_sheets(name, peak):
    assert peak_flops(name) == peak


def test_a_peak_is_measured():
    assert 1e9 < measured_peak(torch.float32) < 1e14
