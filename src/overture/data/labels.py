"""The labels of a classifier, from the ledgers of its splits: what the model is to predict."""

from collections.abc import Iterator
from typing import Any

from overture.errors import ConfigError

Ledgers = dict[str, dict[str, Any]]  # by split, the one that is trained on first
MOST_SHOWN = 8


def head_config(ledgers: Ledgers) -> dict[str, Any]:
    """Return what the config of a model with a head on whole rows must say of these labels.

    Raises ConfigError: there is one class only, or the splits have not the same classes, whose
    numbers would mean other things.
    """
    (split, first), *others = ledgers.items()
    names = first["labels"]
    for other, ledger in others:
        if ledger["labels"] != names:
            theirs = f"{other} has {_shown(ledger['labels'])}"
            fault = f"data_local: the labels of {split} are {_shown(names)}, but {theirs}"
            raise ConfigError(f"{fault}; convert both in one command, or with the same --labels")
    if names is None:
        return {"id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    if len(names) < 2:
        raise ConfigError(f"data_local: {split}: all rows are {names[0]!r}: nothing to tell apart")
    numbers = {name: number for number, name in enumerate(names)}
    kind = "single_label_classification"
    return {"id2label": dict(enumerate(names)), "label2id": numbers, "problem_type": kind}


def describe_labels(ledgers: Ledgers) -> Iterator[str]:
    """Yield a line on the classes of each split and, of the last, what guessing would score."""
    counts: dict[str, int] = {}
    for split, ledger in ledgers.items():
        counts = ledger.get("label_counts") or {}
        if counts:
            largest = sorted(counts.items(), key=lambda item: -item[1])
            total = sum(counts.values())
            shares = [f"{name} {n:,} ({n / total:.1%})" for name, n in largest[:MOST_SHOWN]]
            rest = f", {len(counts) - MOST_SHOWN} more" if len(counts) > MOST_SHOWN else ""
            yield f"labels of {split}: {', '.join(shares)}{rest}"
    if counts:
        most, count = largest[0]
        yield f"always guessing {most!r} would be right in {count / total:.1%} of {split}"


def _shown(names: list[str] | None) -> str:
    if names is None:
        return "numbers (--regression)"
    more = ", ..." if len(names) > MOST_SHOWN else ""
    return f"{len(names)} classes ({', '.join(names[:MOST_SHOWN])}{more})"
