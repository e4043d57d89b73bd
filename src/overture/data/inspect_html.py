"""The page of a split: its figures, how long its rows are, and samples drawn token by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overture.data.inspect import Sample, Token, ledger_figures, samples
from overture.data.page import key_figures, quiet, safe, section, table, write_page
from overture.data.shards import Figures, Split
from overture.errors import ConfigError

KEYS = {
    "prompt": "the model is given, without loss",
    "second": "the second text of a pair",
    "learned": "the model is trained to write",
    "end": "learned too: where the model stops",
    "padding": "fills the batch up, without loss",
}
HINT = (
    "Each box is a token; point at it for its id. ↵ is a line end, · another part of the character "
    "before. A bar on the left holds one document: documents of a sample do not see each other."
)


def write_split_page(
    file: Path, split: Split, figures: Figures, tokenizer: Any, numbers: Sequence[int] | None
) -> None:
    """Write the page of a split.

    Args:
        file: where to; replaced at once.
        split: the split.
        figures: of its rows, or of some of them, which the page then says.
        tokenizer: the one that the split was converted with; None for raw text.
        numbers: samples to draw before the longest, shortest and most masked; None: the first.

    Raises:
        ConfigError: there is no sample of such a number, or the file cannot be written.
        DataError: a row is not what was written.
    """
    lengths, learned = np.array(figures.lengths), np.array(figures.learned)
    extremes = {"Longest": lengths.argmax(), "Shortest": lengths.argmin()}
    extremes |= {"Most masked": (learned / lengths).argmin()} if learned.any() else {}
    chosen = {f"{name}: ": [figures.numbers[place]] for name, place in extremes.items()}
    drawn = "".join(
        _drawn(name, sample)
        for name, some in {"": numbers, **chosen}.items()
        for sample in samples(split, some, tokenizer)
    )
    keys = "".join(f'<li><b class="{k}">{k}</b> {KEYS[k]}</li>' for k in KEYS if f'"{k}"' in drawn)
    facts = [(safe(name), safe(text)) for name, text in ledger_figures(split).items()]
    body = _figures(figures.summary()) + section("Ledger", table(facts, "facts"))
    body += section("Samples, as the model gets them", f"<ul>{keys}</ul>{quiet(HINT)}{drawn}")
    try:
        title = f"{split.ledger['task']}: {split.folder}"
        write_page(file, title, Path(__file__).with_suffix(".css"), body)
    except OSError as error:
        raise ConfigError(f"--html {file}: cannot be written ({error.strerror})") from None


def _drawn(name: str, sample: Sample) -> str:
    html = f"<section><h3>{name}sample {sample.number}</h3>{quiet(safe(sample.about))}"
    for index, tokens in enumerate(sample.documents):
        spans = "".join(map(_span, tokens))
        head = quiet(f"document {index}: {len(tokens):,} tokens")
        html += f'<div class="document">{head}<div class="tokens">{spans}</div></div>'
    return f"{html}{''.join(map(_span, sample.padding))}</section>"


def _span(token: Token) -> str:
    text = safe(token.text or "·").replace("\t", "⇥\t").replace("\n", "↵\n")
    title = "no token yet" if token.id is None else f"id {token.id}"
    return f'<span class="{token.role}" title="{title}">{text}</span>'


def _figures(summary: dict[str, Any]) -> str:
    """Return numbers as key figures, shares in per cent, and groups of them as tables with bars."""
    found, charts = [], ""
    for name, value in ((name.replace("_", " "), value) for name, value in summary.items()):
        if isinstance(value, dict):
            most = max(1e-9, *map(abs, value.values()))
            rows = [
                (safe(k), f'<div style="width: {abs(v) / most:.1%}"></div>', f"{v:,.6g}")
                for k, v in value.items()
            ]
            charts += f"<div>{section(name, table(rows, 'facts'))}</div>"
        elif isinstance(value, int | float):
            found.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.1%}", ""))
    return f'{key_figures(found)}<div class="pair">{charts}</div>'
