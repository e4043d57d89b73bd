"""What headless Chromium draws of a page, measured in it by a script that a copy is given."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed"
)
COMMAND = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
PROBE = """<script>
const all = (where, what) => [...where.querySelectorAll(what)].filter(e => e.checkVisibility())
const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] }
const words = e => e.innerText.trim().replace(/\\s+/g, " ")
const style = (e, name) => getComputedStyle(e).getPropertyValue(name)
const zoomed = (e, figure) => {
  figure.querySelector('[value="8"]').click()
  const wide = box(e)[2] - box(e)[0]
  figure.querySelector('[value="1"]').click()
  return wide
}
const found = {
  wide: document.documentElement.scrollWidth, screen: innerWidth,
  page: style(document.body, "background-color"),
  numbers: all(document, "dl > div").map(e => [...e.children].map(words)),
  headings: all(document, "h2, summary").map(words),
  tables: all(document, "table").map(e => [...e.rows].map(row => [...row.cells].map(words))),
  red: all(document, ".losses b").map(e => [e.innerText, style(e, "background-color")]),
  figures: all(document, "figure").map(figure => ({
    title: figure.querySelector("figcaption").firstChild.textContent,
    plot: box(figure.querySelector(".frame")), choices: box(figure.querySelector(".zooms")),
    ticks: all(figure, "text.y").map(e => [e.textContent, box(e)]),
    lines: all(figure, "line").map(e => [e.getAttribute("class"), box(e)]),
    dots: all(figure, "circle").map(box),
    curves: all(figure, "polyline").map(e => ({name: e.dataset.name, box: box(e),
      colour: style(e, "stroke"), zoomed: zoomed(e.closest(".zoom").firstChild, figure)})),
  })),
}
const told = document.createElement("pre")
told.id = "told"
told.textContent = JSON.stringify(found)
top.document.body.append(told)
</script></body>"""


def browse(page: Path, *options: str) -> str:
    """Return what the browser prints, after a look at what it complains of."""
    done = subprocess.run([*COMMAND, *options, f"file://{page}"], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def drawn(page: Path, width: int, *options: str) -> dict:
    """Return what stands where on a page so wide, in pixels; of folded parts nothing does.

    It is shown in a frame, as a window without a screen is never as narrow as a phone.
    """
    copy = page.with_name("measured.html")
    inside = html.escape(page.read_text().replace("</body>", PROBE))
    copy.write_text(f'<body><iframe width="{width}" height="4000" srcdoc="{inside}"></iframe>')
    said = browse(copy, "--dump-dom", "--virtual-time-budget=5000", *options)
    (told,) = re.findall(r'<pre id="told">(.*)</pre>', said)
    found = json.loads(html.unescape(told))
    assert found["screen"] == width
    return found


def check_charts(found: dict) -> None:
    """Each curve is seen: in its plot, in its own colour, wider if asked, under no control."""
    assert found["figures"] and found["wide"] <= found["screen"]
    for figure in found["figures"]:
        left, top, right, bottom = figure["plot"]
        assert right - left > 150 and bottom - top > 100
        assert figure["choices"][3] <= top + 1 and figure["choices"][2] <= right + 1
        colours = [curve["colour"] for curve in figure["curves"]]
        assert len({*colours, found["page"]}) == len(colours) + 1
        for curve in figure["curves"]:
            x0, y0, x1, y1 = curve["box"]
            assert left - 2 <= x0 < x1 <= right + 2 and top - 2 <= y0 <= y1 <= bottom + 2
            assert curve["zoomed"] == pytest.approx(8 * (right - left), rel=0.02)


def height_of(figure: dict, value: float) -> float:
    """Return where a value stands by the letters at the axis, in pixels from the top."""
    (low, of_low), (high, of_high) = (
        (float(label.replace(",", "")), (at[1] + at[3]) / 2)
        for label, at in (figure["ticks"][0], figure["ticks"][-1])
    )
    return of_low + (value - low) * (of_high - of_low) / (high - low)
