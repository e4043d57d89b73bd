"""The page of a split: its figures, how long its rows are, and samples drawn token by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overture.data.inspect import ledger_figures, samples
from overture.data.page import render, write_page
from overture.data.shards import Figures, Split
from overture.errors import ConfigError


def write_split_page(
    file: Path, split: Split, figures: Figures, tokenizer: Any, numbers: Sequence[int] | None
) -> None:
    """Write the page of a split to `file`, all at once; it says if `figures` are not of all rows.

    Samples of these `numbers`, or for None the first, come before the longest, the shortest and the
    most masked; `tokenizer` is None for raw text. Raises ConfigError if there is no such sample or
    the file cannot be written, DataError if a row is not what was written.
    """
    lengths, learned = np.array(figures.lengths), np.array(figures.learned)
    extremes = {"Longest": lengths.argmax(), "Shortest": lengths.argmin()}
    extremes |= {"Most masked": (learned / lengths).argmin()} if learned.any() else {}
    chosen = {f"{name}: ": [figures.numbers[place]] for name, place in extremes.items()}
    drawn = [
        (name, sample)
        for name, some in {"": numbers, **chosen}.items()
        for sample in samples(split, some, tokenizer)
    ]
    ledger = list(ledger_figures(split).items())
    values = {"figures": figures.summary(), "ledger": ledger, "drawn": drawn}
    body = render(Path(__file__).with_suffix(".html"), **values)
    title = f"{split.ledger['task']}: {split.folder}"
    try:
        write_page(file, title, Path(__file__).with_suffix(".css"), body)
    except OSError as error:
        raise ConfigError(f"--html {file}: cannot be written ({error.strerror})") from None
