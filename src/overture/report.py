"""The page and the closing summary of a run, made from the files of its run folder alone.

`report.html` is one file: no network, no script. The charts are inline SVG, placed in per cent, so
letters keep their size from phone to paper. A part is a function that returns HTML, "" if empty.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from overture.data.page import key_figures, quiet, safe, section, table, write_page
from overture.errors import ConfigError

MAX_CURVE_POINTS = 2000  # a longer curve is drawn through the extremes of each stretch of it
SPECS = {
    "eval_perplexity": ",.2f", "steps": ",.0f", "tokens_seen": ",.0f", "label_tokens_seen": ",.0f",
    "tokens_per_second": ",.0f", "label_tokens_per_second": ",.0f", "seed": ".0f",
}  # fmt: skip
BADGES = {"target_reached": "good", "completed": "good", "failed": "bad"}


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
    run, page = load_run(run_folder), run_folder / "report.html"
    parts = (part(run) for part in (_key_figures, _curves, _evals, _generations, _appendix))
    style = Path(__file__).with_suffix(".css")
    write_page(page, str(run.result.get("run_name")), style, "".join(parts))
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
        "exact match": " -> ".join(_number(m, ".1%") for m in matches if m is not None),
        "time to train": _finite(seconds) and f"{_duration(seconds)} ({seconds:,.1f} s)",
    }
    rows |= {_name(key): _number(result.get(key), spec) for key, spec in SPECS.items()}
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
    text = safe(_number(value, spec))
    return f'<data value="{safe(value)}">{text}</data>' if text else "–"


def _name(key: str) -> str:
    return key.replace("_per_second", "/s").replace("_", " ")


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
    return [(i * step, f"{i * step:,.6g}") for i in span]


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


def _key_figures(run: Run) -> str:
    result, metrics = run.result, run.result.get("metrics") or {}
    style, status = BADGES.get(result.get("status"), ""), safe(result.get("status"))
    time = result.get("time_to_train_seconds")
    losses = dict.fromkeys(("eval_cross_entropy", "eval_cross_entropy_before", "target"), ",.4f")
    figures = [
        ("status", f'<b class="{style}">{status.replace("_", " ")}</b>', ""),
        ("seconds to train", _data(time, ",.1f"), _duration(time) if _finite(time) else ""),
        *((_name(k), _data(result.get(k), spec), "") for k, spec in {**losses, **SPECS}.items()),
    ]
    if metrics.get("exact_match_after") is not None:
        pair = (_data(metrics.get(f"exact_match_{when}"), ".1%") for when in ("before", "after"))
        prompts = f"{_data(metrics.get('exact_match_prompts'), ',.0f')} held-out prompts"
        figures.append(("exact match", " → ".join(pair), prompts))
    others = {k: v for k, v in metrics.items() if _finite(v) and not k.startswith("exact_match")}
    return key_figures([*figures, *((safe(k), _data(v), "") for k, v in others.items())])


def _curves(run: Run) -> str:
    loss = ("train loss", "faint", _points(run.train, "loss"))
    held = ("eval cross-entropy", "strong dots", _points(run.evals, "cross_entropy"))
    every = ("all tokens", "strong", _points(run.train, "tokens_per_second"))
    label = ("label tokens", "faint", _points(run.train, "label_tokens_per_second"))
    rate = ("learning rate", "strong", _points(run.train, "learning_rate"))
    target = run.result.get("target")
    html = _chart("Loss", "cross-entropy (nats per token)", [loss, held], target)
    pair = _chart("Throughput", "tokens per second", [every, label], from_zero=True)
    pair += _chart("Schedule", "learning rate", [rate], from_zero=True)
    shares = {"padding_share": "padding", "data_wait_share": "waiting for data", "mfu": "MFU"}
    columns = {n: [r[k] for r in run.train if _finite(r.get(k))] for k, n in shares.items()}
    medians = [f"{name} {median(column):.1%}" for name, column in columns.items() if column]
    note = f"Median: {', '.join(medians)}." if medians else ""
    return f'{html}<div class="pair">{pair}</div>{quiet(note)}'


def _evals(run: Run) -> str:
    specs = {"step": ",.0f", "seconds": ",.1f", "cross_entropy": ",.4f", "perplexity": ",.2f"}
    rows = [[_data(r.get(k), spec) for k, spec in specs.items()] for r in reversed(run.evals)]
    return section("Evaluations, latest first", table(rows, "numbers", list(specs)))


def _generations(run: Run) -> str:
    def cell(record: dict, key: str) -> str:
        text = "–" if record.get(key) is None else str(record[key])
        mark = '<b class="exact">✓ exact</b>' if record.get(f"exact_{key}") is True else ""
        return f"{mark}<span>{safe(text)}</span>"

    head = ["prompt", "expected", "before", "after"]
    html = table([[cell(r, key) for key in head] for r in run.generations], "texts", head)
    counts = [sum(r.get(f"exact_{key}") is True for r in run.generations) for key in head[2:]]
    note = f"Of these {len(run.generations)}, exact before training {counts[0]}, after {counts[1]}."
    return section("Generations on held-out prompts", html and quiet(note) + html)


def _appendix(run: Run) -> str:
    listing = run.environment and json.dumps(run.environment, indent=2, ensure_ascii=False)
    texts = {"Command": run.environment.get("command"), "Config": run.config, "Machine": listing}
    html = "".join(
        f"<details><summary>{title}</summary><pre>{safe(text)}</pre></details>"
        for title, text in texts.items()
        if text
    )
    return html + "".join(quiet(safe(note)) for note in run.notes)
