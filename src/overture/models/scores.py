"""Scores of a classifier or a regression over a whole eval set, each sample counted once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from overture.errors import ConfigError

# Both [samples, outputs] float64 and [samples] float64 to a scalar.
Score = Callable[[Tensor, Tensor], Tensor]


def _confusion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return how many samples of each class (row) were taken for each (column), float64."""
    classes = outputs.shape[1]
    pairs = targets.long() * classes + outputs.argmax(-1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).to(outputs.dtype)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of samples whose class is the likeliest one."""
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean()


def f1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the F1 of class 1 where there are two, as GLUE has it; else their mean, each class
    that occurs counting alike.
    """
    table = _confusion(outputs, targets)
    room = table.sum(0) + table.sum(1)
    each = 2 * table.diagonal() / room.clamp(min=1)
    return each[1] if len(each) == 2 else each[room > 0].mean()


def matthews(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the correlation R_K of classes (Gorodkin 2004); 0 where one side is constant."""
    table = _confusion(outputs, targets)
    total, true, guessed = table.sum(), table.sum(1), table.sum(0)
    above = table.diagonal().sum() * total - true @ guessed
    below = ((total**2 - true @ true) * (total**2 - guessed @ guessed)).sqrt()
    return above / below if below > 0 else torch.zeros_like(above)


def pearson(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the correlation of the first output with the target; 0 where one is constant."""
    return _correlation(outputs[:, 0], targets)


def spearman(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the correlation of the ranks, equal values sharing theirs."""
    return _correlation(_ranks(outputs[:, 0]), _ranks(targets))


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([one, other]))[0, 1].nan_to_num()


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).to(values.dtype)[which]


OF_CLASSES: dict[str, Score] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
OF_NUMBERS: dict[str, Score] = {"pearson": pearson, "spearman": spearman}


def choose_scores(wanted: list[str] | None, regression: bool) -> dict[str, Score]:
    """Return the scores of these names, by default all that fit; ConfigError if one does not."""
    fitting = OF_NUMBERS if regression else OF_CLASSES
    for name in wanted or ():
        if name not in fitting:
            kind = "numbers (--regression)" if regression else "classes"
            fault = f"metrics: {name} does not fit data whose labels are {kind}"
            raise ConfigError(f"{fault}; there are: {', '.join(fitting)}")
    return {name: fitting[name] for name in wanted or fitting}


class EvalScore(Metric):
    """A score over all samples of an eval set, each counted once as in `TokenCrossEntropy`."""

    full_state_update = False

    def __init__(self, score: Score, num_samples: int, num_outputs: int) -> None:
        super().__init__()
        self.score = score
        shapes = {"outputs": (num_samples, num_outputs), "targets": num_samples}
        for name, shape in {**shapes, "seen": num_samples}.items():
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor, sample_ids: Tensor) -> None:
        """Add a batch: outputs [rows, outputs], targets [rows], sample_ids [rows]."""
        self.outputs.index_add_(0, sample_ids, outputs.to(self.outputs.dtype))
        self.targets.index_add_(0, sample_ids, targets.to(self.targets.dtype))
        self.seen.index_add_(0, sample_ids, torch.ones_like(targets, dtype=self.seen.dtype))

    def compute(self) -> Tensor:
        times = self.seen.clamp(min=1)
        return self.score(self.outputs / times[:, None], self.targets / times)
