"""Which row goes into which split. Splits are drawn before anything is dropped, so that no filter
can move a row between them; then a row that is held out anywhere leaves train.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from overture.data.examine import Examination, Fields, repeats
from overture.data.sources import Source
from overture.errors import ConfigError


@dataclass
class Part:
    """A source, what was found in it, and for each row the number of its split in `splits`."""

    source: Source
    fields: Fields
    found: Examination
    splits: list[str]
    owners: np.ndarray  # [rows] uint8


def draw(
    source: Source, fields: Fields, found: Examination, split: str, test_fraction: float, seed: int
) -> Part:
    """Return a source with its rows divided; raises ConfigError if none would be left to train on.

    The test share is rounded up, as scikit-learn and datasets have it. Stratified, each stratum
    gives its share, and the largest remainders give what is then still missing.
    """
    owners = np.zeros(found.rows, np.uint8)
    if not test_fraction:
        return Part(source, fields, found, [split], owners)
    held_out = math.ceil(found.rows * test_fraction)
    if held_out == found.rows:
        share = f"--test_fraction {test_fraction} of {found.rows} rows"
        raise ConfigError(f"{share} leaves none to train on")
    rng = random.Random(seed)
    if "messages" in fields.kinds:  # conversations that begin alike stay together
        sizes = Counter(found.prompts.tolist())
        rng.shuffle(openings := list(sizes))
        enough = itertools.accumulate(sizes[o] for o in openings)
        chosen = [o for o, total in zip(openings, enough, strict=True) if total <= held_out]
        owners[np.isin(found.prompts, chosen or openings[:1])] = 1
    elif fields.stratify is None:
        owners[rng.sample(range(found.rows), held_out)] = 1
    else:
        for rows, count in _strata(found.strata, held_out):
            owners[[rows[i] for i in rng.sample(range(len(rows)), count)]] = 1
    return Part(source, fields, found, ["train", "test"], owners)


def _strata(keys: np.ndarray, held_out: int) -> list[tuple[np.ndarray, int]]:
    """Return (rows, how many of them to hold out) per stratum, in the order they first appear."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    groups = [np.flatnonzero(which == number) for number in np.argsort(first)]
    shares = [len(rows) * held_out / len(keys) for rows in groups]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(groups)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: held_out - sum(counts)]:
        counts[i] += 1
    return list(zip(groups, counts, strict=True))


def mark_repeats(parts: Sequence[Part], dedupe: bool) -> None:
    """Give rows of train* whose prompt is held out, and with `dedupe` repeated rows, their fate."""
    held_out, train_rows = [], []
    for part in parts:
        train = [i for i, split in enumerate(part.splits) if split.startswith("train")]
        train_rows.append((part.found.fates == 0) & np.isin(part.owners, train))
        held_out.append(part.found.prompts[(part.found.fates == 0) & ~train_rows[-1]])
    for part, rows in zip(parts, train_rows, strict=True):
        found = part.found
        rows = rows & np.isin(found.prompts, np.concatenate(held_out))
        found.fates[rows] = found.fate("also_held_out")
        if dedupe:
            left = np.flatnonzero(found.fates == 0)
            found.fates[left[repeats(found.contents[left])]] = found.fate("duplicate")
