"""The page and the closing summary of a run, made from the files of its run folder alone.

`report.html` is one file: no network, no script. The charts are inline SVG, placed in per cent, so
letters keep their size from phone to paper. A section is a function that returns HTML, "" if empty.
"""

import json
import math
import os
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median

from overture.errors import ConfigError

MAX_CURVE_POINTS = 2000  # a longer curve is drawn through the extremes of each stretch of it
MAX_OPEN_ROWS = 10  # the rows of a table that follow are folded
BADGES = {"target_reached": "good", "completed": "good", "failed": "bad"}  # any other: "warn"


@dataclass
class Run:
    """What a run folder says. Records are sorted by step, of which the last record wins."""

    result: dict
    notes: list[str] = field(default_factory=list)
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    generations: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    config: str = ""


def build_report(run_folder: Path) -> Path:
    """Writes `<run_folder>/report.html` and returns its path; raises as load_run does."""
    page, aside = run_folder / "report.html", run_folder / "report.html.part"
    aside.write_text(_page(load_run(run_folder)), encoding="utf-8", errors="replace")
    os.replace(aside, page)
    return page


def summary_lines(result: dict) -> list[str]:
    """Returns the closing summary for the terminal: at most 12 aligned lines, without nulls."""
    metrics, seconds = result.get("metrics") or {}, result.get("time_to_train_seconds")
    losses = [result.get("eval_cross_entropy_before"), result.get("eval_cross_entropy")]
    matches = [metrics.get("exact_match_before"), metrics.get("exact_match_after")]
    rows = {
        "status": str(result.get("status")).replace("_", " "),
        "target": _number(result.get("target")) or "none",
        "eval cross-entropy": " -> ".join(filter(None, map(_number, losses))),
        "eval perplexity": _number(result.get("eval_perplexity"), ",.2f"),
        "time to train": _finite(seconds) and f"{_duration(seconds)} ({seconds:,.1f} s)",
        "steps": _number(result.get("steps"), ",.0f"),
        "tokens": _number(result.get("tokens_seen"), ",.0f"),
        "label tokens": _number(result.get("label_tokens_seen"), ",.0f"),
        "tokens/s": _number(result.get("tokens_per_second"), ",.0f"),
        "label tokens/s": _number(result.get("label_tokens_per_second"), ",.0f"),
        "exact match": " -> ".join(_number(m, ".1%") for m in matches if m is not None),
    }
    return [f"{name:<20}{text}" for name, text in rows.items() if text]


def load_run(folder: Path) -> Run:
    """Returns the run in `folder`; raises ConfigError without a readable result.json."""
    result = _parse(_read(folder / "result.json"))
    if result is None:
        raise ConfigError(f"{folder}: no readable result.json; give the folder of a run that ended")
    run = Run(result, config=_read(folder / "config.yaml"))
    run.environment = _parse(_read(folder / "environment.json")) or {}
    metrics = _records(folder / "metrics.jsonl", run.notes)
    for kind, kept in {"train": run.train, "eval": run.evals}.items():
        found = (r for r in metrics if r.get("kind") == kind and _finite(r.get("step")))
        kept += sorted({r["step"]: r for r in found}.values(), key=lambda record: record["step"])
    run.generations = _records(folder / "generations.jsonl", run.notes)
    if lost := sum(not _finite(record.get("loss")) for record in run.train):
        run.notes.append(f"Training records without a finite loss, not drawn: {lost}.")
    return run


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else None


def _records(path: Path, notes: list[str]) -> list[dict]:
    parsed = [_parse(line) for line in _read(path).split("\n") if line.strip()]
    if broken := parsed.count(None):  # a killed run leaves half a line
        notes.append(f"Unreadable lines of {path.name}, skipped: {broken}.")
    return [record for record in parsed if record is not None]


def _finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _number(value, spec: str = ",.4f") -> str:
    """Returns the number for reading, "" for null."""
    return format(value, spec) if _finite(value) else "" if value is None else str(value)


def _data(value, spec: str = ",.4f") -> str:
    """Returns the number for reading as HTML that also holds the exact one of the file."""
    text = escape(_number(value, spec))
    return f'<data value="{escape(str(value))}">{text}</data>' if text else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s" if minutes else f"{seconds:.1f} s"


def _points(records: list[dict], key: str) -> list[tuple[float, float]]:
    """Returns (step, value) where the value is finite, thinned so that every spike stays."""
    points = [(record["step"], record[key]) for record in records if _finite(record.get(key))]
    size = math.ceil(2 * len(points) / MAX_CURVE_POINTS) if len(points) > MAX_CURVE_POINTS else 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return sorted({f(part, key=lambda point: point[1]) for part in parts for f in (min, max)})


def _ticks(low: float, high: float, least: float = 0.0) -> list[tuple[float, str]]:
    """Returns about five round (value, label), at least `least` apart, that enclose low to high."""
    if low == high:
        low, high = (low - abs(low) / 10, low + abs(low) / 10) if low else (0.0, 1.0)
    size = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = max(least, next(m * size for m in (1, 2, 5, 10) if m * size >= (high - low) / 5.001))
    span = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    unit, suffix = next(u for u in ((1e6, "M"), (1e3, "k"), (0, "")) if step >= u[0])
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{{:,.{digits}f}}" if digits < 5 else "{:.3g}"
    return [(i * step, text.format(i * step / (unit or 1)) + suffix * bool(i)) for i in span]


def _chart(title: str, y_title: str, curves: list[tuple], target=None, from_zero=False) -> str:
    """Returns a line chart over optimizer steps, "" without points. A curve is (name, classes,
    points), where the class "dots" marks each point and labels the last."""
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return ""
    steps, values = zip(*(point for _, _, points in curves for point in points), strict=True)
    left, right = min(steps), max(*steps, min(steps) + 1)
    values += (0.0,) * from_zero + (target,) * _finite(target)
    rows = _ticks(min(values), max(values))
    low, high = rows[0][0], rows[-1][0]

    def x(step: float) -> str:
        return f"{100 * (step - left) / (right - left):.3f}"

    def y(value: float) -> str:
        return f"{100 * (high - value) / (high - low):.3f}"

    svg = ""
    for value, label in rows:
        svg += f'<line class="grid" data-y="{value}" y1="{y(value)}%" y2="{y(value)}%" x2="100%"/>'
        svg += f'<text class="y" y="{y(value)}%" dx="-8" dy="4">{label}</text>'
    for step, label in _ticks(left, right, least=1.0):
        if left <= step <= right:
            svg += f'<text class="x" x="{x(step)}%" y="100%" dy="18">{label}</text>'
    for name, style, points in curves:
        line = " ".join(f"{x(step)},{y(value)}" for step, value in points)
        svg += f'<svg viewBox="0 0 100 100" preserveAspectRatio="none"><polyline points="{line}" '
        svg += f'class="{style}" data-name="{name}"/></svg>'
        for step, value in points if "dots" in style or len(points) == 1 else []:
            svg += f'<circle class="{style}" cx="{x(step)}%" cy="{y(value)}%" r="3.5"/>'
        if "dots" in style:
            svg += f'<text x="{x(step)}%" y="{y(value)}%" dx="9" dy="4">{value:.3f}</text>'
    if _finite(target):
        svg += f'<line class="target" x2="100%" y1="{y(target)}%" y2="{y(target)}%"/>'
        svg += f'<text class="target" y="{y(target)}%" dx="6" dy="-6">target {target:g}</text>'
    keys = "".join(f'<li class="{style}">{name}</li>' for name, style, _ in curves)
    return (
        f"<figure><figcaption>{title}<ul>{keys if len(curves) > 1 else ''}</ul></figcaption>"
        f'<p class="axis">{y_title}</p><svg role="img" aria-label="{title}: {y_title}">{svg}</svg>'
        '<p class="axis under">optimizer step</p></figure>'
    )


def _header(run: Run) -> str:
    result, style = run.result, BADGES.get(run.result.get("status"), "warn")
    names = {"steps": "steps", "tokens_seen": "tokens", "label_tokens_seen": "label tokens"}
    facts = [f"{_data(result.get(key), ',.0f')} {name}" for key, name in names.items()]
    status = escape(str(result.get("status")).replace("_", " "))
    title = f'<h1>{escape(str(result.get("run_name")))}</h1><b class="badge {style}">{status}</b>'
    facts.append(f"seed {_data(result.get('seed'), '.0f')}")
    return f"<header>{title}<p>{' · '.join(facts)}</p></header>"


def _key_figures(run: Run) -> str:
    result, metrics = run.result, run.result.get("metrics") or {}
    target, before = result.get("target"), result.get("eval_cross_entropy_before")
    note = "no target" if target is None else f"target {_data(target)}"
    note += "" if before is None else f"<br>before training {_data(before)}"
    seconds = result.get("time_to_train_seconds")
    time = (_duration(seconds), f"{_data(seconds, ',.1f')} s") if _finite(seconds) else ("–", "")
    figures = [
        ("Eval cross-entropy", _data(result.get("eval_cross_entropy")), note),
        ("Eval perplexity", _data(result.get("eval_perplexity"), ",.2f"), ""),
        ("Time to train", *time),
        ("Tokens per second", _data(result.get("tokens_per_second"), ",.0f"), ""),
        ("Label tokens per second", _data(result.get("label_tokens_per_second"), ",.0f"), ""),
    ]
    if metrics.get("exact_match_after") is not None:
        pair = (_data(metrics.get(f"exact_match_{when}"), ".1%") for when in ("before", "after"))
        prompts = f"{_data(metrics.get('exact_match_prompts'), ',.0f')} held-out prompts"
        figures.append(("Exact match", " → ".join(pair), prompts))
    others = {k: v for k, v in metrics.items() if _finite(v) and not k.startswith("exact_match")}
    figures += [(escape(name), _data(value), "") for name, value in others.items()]
    html = "".join(f"<div><dt>{n}</dt><dd>{v}</dd><dd>{note}</dd></div>" for n, v, note in figures)
    return f'<dl class="figures">{html}</dl>'


def _loss(run: Run) -> str:
    train = ("train loss", "faint", _points(run.train, "loss"))
    held = ("eval cross-entropy", "strong dots", _points(run.evals, "cross_entropy"))
    return _chart("Loss", "cross-entropy (nats per token)", [train, held], run.result.get("target"))


def _speed(run: Run) -> str:
    every = ("all tokens", "strong", _points(run.train, "tokens_per_second"))
    label = ("label tokens", "faint", _points(run.train, "label_tokens_per_second"))
    rate = ("learning rate", "strong", _points(run.train, "learning_rate"))
    html = _chart("Throughput", "tokens per second", [every, label], from_zero=True)
    html += _chart("Schedule", "learning rate", [rate], from_zero=True)
    shares = {"padding_share": "padding", "data_wait_share": "waiting for data", "mfu": "MFU"}
    columns = {n: [r[k] for r in run.train if _finite(r.get(k))] for k, n in shares.items()}
    medians = [f"{name} {median(column):.1%}" for name, column in columns.items() if column]
    note = f'<p class="quiet">Median: {", ".join(medians)}.</p>' if medians else ""
    return f'<div class="pair">{html}</div>{note}'


def _evals(run: Run) -> str:
    specs = {"step": ",.0f", "seconds": ",.1f", "cross_entropy": ",.4f", "perplexity": ",.2f"}
    rows = [[_data(r.get(k), spec) for k, spec in specs.items()] for r in reversed(run.evals)]
    table = _table(["step", "seconds", "cross-entropy", "perplexity"], rows, "numbers")
    return f"<h2>Evaluations, latest first</h2>{table}" if rows else ""


def _generations(run: Run) -> str:
    def cell(record: dict, key: str) -> str:
        text = "–" if record.get(key) is None else str(record[key])
        mark = '<b class="exact">✓ exact</b>' if record.get(f"exact_{key}") is True else ""
        return f"{mark}<span>{escape(text)}</span>"

    head = ["prompt", "expected", "before", "after"]
    table = _table(head, [[cell(r, key) for key in head] for r in run.generations], "texts")
    counts = [sum(r.get(f"exact_{key}") is True for r in run.generations) for key in head[2:]]
    note = f"Of these {len(run.generations)}, exact before training {counts[0]}, after {counts[1]}."
    html = f'<h2>Generations on held-out prompts</h2><p class="quiet">{note}</p>{table}'
    return html if run.generations else ""


def _table(head: list[str], rows: list[list[str]], style: str) -> str:
    """Returns a table of cells that are HTML already; rows after MAX_OPEN_ROWS are folded."""
    names = "<th>" + "</th><th>".join(head) + "</th>"
    lines = ["<tr><td>" + "</td><td>".join(row) + "</td></tr>" for row in rows]
    html = f'<table class="{style}"><thead><tr>{names}</tr></thead><tbody>%s</tbody></table>'
    shown, folded = "".join(lines[:MAX_OPEN_ROWS]), "".join(lines[MAX_OPEN_ROWS:])
    more = f"<details><summary>{len(rows) - MAX_OPEN_ROWS} more</summary>%s</details>" % html
    return html % shown + (more % folded if folded else "")


def _appendix(run: Run) -> str:
    environment = dict(run.environment)
    command = environment.pop("command", "")
    html = f"<h2>Reproduce</h2><pre>{escape(str(command))}</pre>" if command else ""
    listing = json.dumps(environment, indent=2, ensure_ascii=False) if environment else ""
    for title, text in {"Resolved config": run.config, "Environment": listing}.items():
        block = f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
        html += block if text else ""
    return html + "".join(f'<p class="quiet">{escape(note)}</p>' for note in run.notes)


def _page(run: Run) -> str:
    sections = (_header, _key_figures, _loss, _speed, _evals, _generations, _appendix)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Run {escape(str(run.result.get('run_name')))}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(section(run) for section in sections)}</main></body></html>"
    )


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2127; --quiet: #5d6773; --line: #e2e6ea;
  --strong: #1d5fb8; --faint: #8b97a5; --target: #b4530a; --good: #1a7440; --bad: #b3261e }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e7ea;
  --quiet: #9aa4af; --line: #2d333a; --strong: #7db1f5; --faint: #76828f; --target: #f0a25c;
  --good: #6cc792; --bad: #f28b82 } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 920px; margin: auto; padding: 40px 20px; overflow-wrap: anywhere }
h1 { display: inline; font-size: 26px; margin-right: 12px }
h2, figcaption { font-size: 16px; font-weight: 600; margin: 40px 0 4px }
.badge { display: inline-block; padding: 1px 10px; border: 1px solid; border-radius: 99px;
  font-size: 13px; vertical-align: 4px; color: var(--target) } .badge.bad { color: var(--bad) }
.quiet, .axis, dt, dd, th { color: var(--quiet); font-size: 13px; margin: 4px 0; font-weight: 400 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 40%), 1fr));
  gap: 20px; padding: 20px 0; border: solid var(--line); border-width: 1px 0; margin-top: 28px }
dt + dd { font-size: 21px; font-weight: 600; line-height: 1; color: var(--ink) }
figure { margin: 0 48px; break-inside: avoid } figcaption { display: flex; margin: 40px -48px 4px }
ul { display: flex; margin: 0; padding: 0; font: 13px/24px system-ui, sans-serif; flex-wrap: wrap }
li { display: block; margin-left: 18px } li::before { content: "— "; color: var(--faint) }
figure > svg { display: block; width: 100%; height: 300px; margin: 12px 0 26px; overflow: visible }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)) }
.pair figure > svg { height: 170px } svg svg { overflow: visible; width: 100%; height: 100% }
.under, text.y { text-align: right; text-anchor: end } text.x { text-anchor: middle }
text { font-size: 12px; fill: var(--quiet); stroke: var(--page); paint-order: stroke }
polyline { fill: none; stroke: var(--faint); vector-effect: non-scaling-stroke }
.strong { stroke: var(--strong); stroke-width: 2 } circle { fill: var(--strong) }
text { stroke-width: 4 } text.target { fill: var(--target) } .grid { stroke: var(--line) }
line.target { stroke: var(--target); stroke-width: 1.5; stroke-dasharray: 6 4 }
table { width: 100%; border-collapse: collapse; font-size: 14px; table-layout: fixed }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0 } summary { margin: 8px 0 }
.texts tr { border-bottom: 1px solid var(--line) } .texts th:first-child { width: 34% }
.numbers { max-width: 560px; font-variant-numeric: tabular-nums } .exact { display: block }
td span, pre { display: block; white-space: pre-wrap } td span { max-height: 15em; overflow: auto }
pre { font: 13px/1.5 ui-monospace, monospace; padding: 12px; border: 1px solid var(--line) }
summary, li.strong::before { color: var(--strong) } .badge.good, .exact { color: var(--good) }
@media screen and (max-width: 600px) { .texts thead { display: none } figure > svg { height: 240px }
  .texts td { display: block; padding: 4px 0 } .texts td + td::before { color: var(--quiet);
  font-size: 12px; content: "expected" } .texts td:nth-child(3)::before { content: "before" }
  .texts td:nth-child(4)::before { content: "after" } .texts tr { display: block; padding: 8px 0 } }
@media print { ::details-content { content-visibility: visible } td span { max-height: none } }
"""
