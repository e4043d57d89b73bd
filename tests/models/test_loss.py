"""The loss against torch's own in float64, and the eval metric on any number of ranks."""

import pytest
import torch
import torch.nn.functional as F

from overture.models.loss import TokenCrossEntropy, cross_entropy_at, label_positions


def test_positions_are_one_left_of_the_label():
    labels = torch.tensor([[-100, 5, -100, 7], [-100, -100, -100, -100], [3, -100, 4, -100]])
    rows, positions, targets = label_positions(labels)
    # The 3 in column 0 has nothing before it that could predict it.
    assert list(zip(rows.tolist(), positions.tolist(), targets.tolist(), strict=True)) == [
        (0, 0, 5),
        (0, 2, 7),
        (2, 1, 4),
    ]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 300])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0)])
def test_equals_torch_in_float64(count, scale, softcap):
    torch.manual_seed(0)
    head = torch.nn.Linear(12, 40, bias=False)
    hidden = torch.randn(count, 12, requires_grad=True)
    targets = torch.randint(0, 40, (count,))
    losses = cross_entropy_at(hidden, head, targets, scale, softcap)
    assert losses.shape == (count,)
    logits = (hidden.double() @ head.weight.double().T) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    if count:
        ours, theirs = (
            torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (losses, expected)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


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
