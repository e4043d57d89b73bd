"""Pages of one file, no network, no script; what stands in the data is untrusted: it stays text."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from overture.data.schema import write_aside

# Text of others must neither move the cursor of a terminal nor turn the direction of a page.
_VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")


def visible(text: str) -> str:
    """Return a text with signs in place of control characters, but for line ends and tabs."""
    return text.translate(_VISIBLE)


def write_page(file: Path, module: Path, title: str, **values: Any) -> None:
    """Write a page, all at once: the .html beside a module filled in, the .css beside it for style.

    Values are shown as text. The templates may extend `page.html` and take parts of `parts.html`.
    """
    templates = Environment(
        loader=FileSystemLoader([module.parent, Path(__file__).parent]), autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    )  # fmt: skip
    template = templates.get_template(f"{module.stem}.html")
    page = template.render(title=title, style=f"{module.stem}.css", **values)
    # Half of a surrogate pair cannot be written; a mark in its place can.
    write_aside(file, page.encode("utf-8", "replace").decode("utf-8") + "\n")
