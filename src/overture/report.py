"""The page and the closing summary of a run, made from the files of its run folder alone."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import yaml

from overture.data.page import write_page
from overture.errors import ConfigError

TOKEN_LOSSES = "token_losses.jsonl"
UNIT = "cross-entropy (nats per label)"
REGRESSION = {"pearson", "spearman"}  # scores of it
MAX_CURVE_POINTS = 2000  # a longer curve is drawn through the extremes of each stretch of it
SPECS = {
    "eval_perplexity": ",.2f", "steps": ",.0f", "tokens_seen": ",.0f", "label_tokens_seen": ",.0f",
    "tokens_per_second": ",.0f", "label_tokens_per_second": ",.0f", "seed": ".0f",
}  # fmt: skip
EVAL_SPECS = {"step": ",.0f", "seconds": ",.1f", "cross_entropy": ",.4f", "perplexity": ",.2f"}
FIRST_SPECS = dict.fromkeys(("eval_cross_entropy", "eval_cross_entropy_before", "target"), ",.4f")


@dataclass
class Run:
    """What a run folder says. Records are sorted by step, of which the last record wins."""

    result: dict
    notes: list[str] = field(default_factory=list)
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)  # step, what
    translations: list[tuple[int, str]] = field(default_factory=list)
    generations: list[dict] = field(default_factory=list)
    losses: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    config: str = ""


def build_report(run_folder: Path) -> Path:
    """Writes `<run_folder>/report.html` and returns its path; raises as load_run does."""
    run, page = load_run(run_folder), run_folder / "report.html"
    splits = run.environment.pop("data", [])
    machine = run.environment and json.dumps(run.environment, indent=2, ensure_ascii=False)
    texts = {"Command": run.environment.get("command"), "Config": run.config, "Machine": machine}
    shares = {"padding_share": "padding", "data_wait_share": "waiting for data",
              "outside_share": "outside the model", "mfu": "MFU"}  # fmt: skip
    columns = {n: [r[k] for r in run.train if _finite(r.get(k))] for k, n in shares.items()}
    medians = [f"{name} {median(column):.1%}" for name, column in columns.items() if column]
    keys = [key for key in (run.evals[-1] if run.evals else ()) if key != "kind"]
    evals = {key: EVAL_SPECS.get(key, ",.4f") for key in keys}  # a classifier has scores
    drawn = {"run": run, "charts": _charts(run), "medians": medians, "splits": splits}
    loss = "cross entropy" if unit_of(run) == UNIT else "loss"
    helpers = {"number": _number, "finite": _finite, "duration": _duration}
    helpers["name"] = lambda key: _name(key).replace("cross entropy", loss)
    title, specs = str(run.result.get("run_name")), {**FIRST_SPECS, **SPECS}
    helpers |= {"specs": specs, "eval_specs": evals, "texts": texts}
    write_page(page, Path(__file__), title, **drawn, **helpers)
    return page


def summary_lines(result: dict) -> list[str]:
    """Returns the closing summary for the terminal: at most 12 aligned lines, without nulls."""
    return [f"{name:<20}{text}" for name, text in summary_rows(result).items() if text]


def summary_rows(result: dict) -> dict[str, str]:
    """Returns the names and texts of a run's outcome; "" or None for what it has not."""
    metrics, seconds = result.get("metrics") or {}, result.get("time_to_train_seconds")
    losses = [result.get("eval_cross_entropy_before"), result.get("eval_cross_entropy")]
    matches = [metrics.get("exact_match_before"), metrics.get("exact_match_after")]
    scores = metrics if matches == [None, None] else {}
    took, minutes = _finite(seconds) and f"{seconds:,.1f} s", _duration(seconds)
    loss = "eval loss" if REGRESSION & {*metrics} else "eval cross-entropy"
    rows = {
        "status": str(result.get("status")).replace("_", " "),
        "target": _number(result.get("target")) or "none",
        loss: " -> ".join(filter(None, map(_number, losses))),
        "exact match": " -> ".join(_number(m, ".1%") for m in matches if m is not None),
        "scores": ", ".join(f"{name} {_number(score)}" for name, score in scores.items()),
        "time to train": f"{minutes} ({took})" if minutes else took,
    }
    return rows | {_name(key): _number(result.get(key), spec) for key, spec in SPECS.items()}


def load_run(folder: Path) -> Run:
    """Returns the run in `folder`, one that did not end too; ConfigError if there is none."""
    result = _parse(_read(folder / "result.json"))
    if result is None and (folder / "metrics.jsonl").is_file():  # it was killed, or is under way
        result = {"run_name": folder.name, "status": "unfinished"}
    if result is None:
        raise ConfigError(f"{folder}: no readable result.json or metrics.jsonl; give a run")
    environment = _parse(_read(folder / "environment.json")) or {}
    asked = yaml.safe_load(_read(folder / "config.yaml")) or {}
    target = (asked.get("callbacks") or {}).get("loss_target") or {}
    result.setdefault("target", target.get("cross_entropy"))  # one that broke off says none
    run = Run(result, config=_read(folder / "config.yaml"), environment=environment)
    metrics = read_records(folder / "metrics.jsonl", run.notes)
    for kind, kept in {"train": run.train, "eval": run.evals}.items():
        found = (r for r in _current(metrics) if r.get("kind") == kind)
        kept += sorted({r["step"]: r for r in found}.values(), key=lambda record: record["step"])
    for kind, said in {"event": run.events, "translation": run.translations}.items():
        found = [r for r in metrics if r.get("kind") == kind and _finite(r.get("step"))]
        said += sorted({(r["step"], str(r.get("what"))) for r in found})
    run.generations = read_records(folder / "generations.jsonl", run.notes)
    run.losses = read_records(folder / TOKEN_LOSSES, run.notes)
    if lost := sum(not _finite(record.get("loss")) for record in run.train):
        run.notes.append(f"Training records without a finite loss, not drawn: {lost}.")
    return run


def _current(records: list[dict]) -> list[dict]:
    """Returns the records with a step, without those behind one from which a run went on later."""
    kept: list[dict] = []
    for record in (r for r in records if _finite(r.get("step"))):
        if record.get("what") == "resumed":
            kept = [one for one in kept if one["step"] <= record["step"]]
        kept.append(record)
    return kept


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else None


def read_records(path: Path, notes: list[str]) -> list[dict]:
    """Returns the records of a file of JSON lines, [] if there is none; `notes` get its faults."""
    parsed = [_parse(line) for line in _read(path).split("\n") if line.strip()]
    if broken := parsed.count(None):  # a killed run leaves half a line
        notes.append(f"Unreadable lines of {path.name}, skipped: {broken}.")
    return [record for record in parsed if record is not None]


def _finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _number(value, spec: str = ",.4f") -> str:
    """Returns the number for reading, "" for null."""
    return format(value, spec) if _finite(value) else "" if value is None else str(value)


def _name(key: str) -> str:
    return key.replace("_per_second", "/s").replace("_", " ")


def _duration(seconds: float | None) -> str:
    """Returns minutes and seconds, "" for less than a minute."""
    minutes, rest = divmod(round(seconds), 60) if _finite(seconds) else (0, 0)
    return f"{minutes:,} min {rest} s" if minutes else ""


def points(records: list[dict], key: str) -> list[tuple[float, float]]:
    """Returns (step, value) where the value is finite, thinned so that every spike stays."""
    points = [(record["step"], record[key]) for record in records if _finite(record.get(key))]
    size = math.ceil(2 * len(points) / MAX_CURVE_POINTS) if len(points) > MAX_CURVE_POINTS else 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    extremes = (f(part, key=lambda point: point[1]) for part in parts for f in (min, max))
    return sorted({*extremes, *points[-1:]})  # the last one is named at its place


def _ticks(low: float, high: float, least: float = 0.0, parts: int = 5) -> list[tuple[float, str]]:
    """Returns about as many round (value, label), at least `least` apart, that enclose low to high
    as there are to be `parts`."""
    if low == high:
        low, high = (low - abs(low) / 10, low + abs(low) / 10) if low else (0.0, 1.0)
    part = (high - low) / parts
    size = 10.0 ** math.floor(math.log10(part))
    step = max(least, next(m * size for m in (1, 2, 5, 10) if m * size >= part * 0.9998))
    span = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    return [(i * step, f"{i * step:,.6g}") for i in span]


def chart(title: str, unit: str, curves: list[tuple], target=None, from_zero=False, events=()):
    """Returns what the template draws a line chart of, None without points: its round figures,
    and `x` and `y`, which place a step and a value in it. A curve is (name, classes, points)."""
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return None
    steps, values = zip(*(point for _, _, points in curves for point in points), strict=True)
    left, right = min(steps), max(*steps, min(steps) + 1)
    near = right + max(4, (right - left) / 20)  # no loss is left where a guard stopped
    right = max([right, *(step for step, _ in events if right < step <= near)])
    values += (0.0,) * from_zero + (target,) * _finite(target)
    rows = _ticks(min(values), max(values))
    low, high = rows[0][0], rows[-1][0]
    every = (_ticks(left, right, 1.0, parts) for parts in (5, 20))  # 20 where it is drawn wider
    columns, fine = ([tick for tick in ticks if left <= tick[0] <= right] for ticks in every)
    return {
        "title": title, "unit": unit, "curves": curves, "rows": rows, "columns": columns,
        "fine": fine, "target": target if _finite(target) else None,
        "events": [event for event in events if left <= event[0] <= right],
        "x": lambda step: f"{100 * (step - left) / (right - left):.3f}",
        "y": lambda value: f"{100 * (high - value) / (high - low):.3f}",
    }  # fmt: skip


def unit_of(run: Run) -> str:
    """Returns what a run's losses are measured in."""
    scores = {**(run.result.get("metrics") or {}), **(run.evals[-1] if run.evals else {})}
    return "squared error" if REGRESSION & {*scores} else UNIT


def _charts(run: Run) -> list[dict | None]:
    loss = ("train loss", "faint", points(run.train, "loss"))
    name = "eval cross-entropy" if unit_of(run) == UNIT else "eval loss"
    held = (name, "strong dots", points(run.evals, "cross_entropy"))
    every = ("all tokens", "strong", points(run.train, "tokens_per_second"))
    label = ("label tokens", "faint", points(run.train, "label_tokens_per_second"))
    rate = ("learning rate", "strong", points(run.train, "learning_rate"))
    marks = {"target": run.result.get("target"), "events": run.events}
    return [
        chart("Loss", unit_of(run), [loss, held], **marks),
        chart("Throughput", "tokens per second", [every, label], from_zero=True),
        chart("Schedule", "learning rate", [rate], from_zero=True),
    ]
