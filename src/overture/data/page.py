"""What the pages of a split and of a run share: frame, style, key figures, tables, escaping.

A page is one file: no network, no script. What stands in the data is untrusted and stays text.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from overture.data.schema import write_aside

MAX_OPEN_ROWS = 12  # the rows of a table that follow are folded
# Text of others must neither move the cursor of a terminal nor turn the direction of a page.
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")


def visible(text: str) -> str:
    """Return a text with signs in place of control characters, but for line ends and tabs."""
    return text.translate(_VISIBLE)


def safe(value: Any) -> str:
    """Return the text of a value as HTML that shows it and does nothing else."""
    return escape(visible(str(value)))


def quiet(html: str) -> str:
    """Return a paragraph of what need not be read first, "" if there is none."""
    return f'<p class="quiet">{html}</p>' if html else ""


def section(title: str, html: str) -> str:
    """Return HTML under its title, "" if there is none."""
    return f"<h2>{title}</h2>{html}" if html else ""


def key_figures(figures: Iterable[tuple[str, str, str]]) -> str:
    """Return large figures side by side, each (name, HTML, note as HTML)."""
    html = "".join(f"<div><dt>{n}</dt><dd>{v}</dd><dd>{note}</dd></div>" for n, v, note in figures)
    return f"<dl>{html}</dl>"


def table(rows: Iterable[Sequence[str]], style: str, head: Sequence[str] = ()) -> str:
    """Return a table of cells that are HTML already; rows after MAX_OPEN_ROWS are folded."""
    names = f"<thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead>" if head else ""
    lines = [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows]
    shown, folded = (
        f'<table class="{style}">{names}<tbody>{"".join(part)}</tbody></table>' if part else ""
        for part in (lines[:MAX_OPEN_ROWS], lines[MAX_OPEN_ROWS:])
    )
    more = f"<details><summary>{len(lines) - MAX_OPEN_ROWS} more</summary>{folded}</details>"
    return shown + (more if folded else "")


def render(template: Path, **values: Any) -> str:
    """Return a Jinja template filled in; values are shown as `safe` does."""
    shown = Environment(
        autoescape=True, finalize=lambda v: v if isinstance(v, Markup) else visible(str(v))
    )
    return shown.from_string(template.read_text("utf-8")).render(values)


def write_page(file: Path, title: str, style: Path, body: str) -> None:
    """Write a page with its title on top and the CSS of `style`, all at once."""
    css = Path(__file__).with_suffix(".css").read_text("utf-8") + style.read_text("utf-8")
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title><style>{css}</style></head>"
        f"<body><main><h1>{safe(title)}</h1>{body}</main></body></html>\n"
    )
    # Half of a surrogate pair cannot be written; a mark in its place can.
    write_aside(file, page.encode("utf-8", "replace").decode("utf-8"))
