"""The page on several runs side by side, made from the files of their run folders alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from overture.data.page import write_page
from overture.errors import ConfigError
from overture.report import Run, chart, load_run, points, summary_rows, unit_of

MOST = 6  # runs, for which there are colours
OWN = {"run_name", "run_folder", "save_folder"}  # differ between any two runs
MAX_ANSWERS = 60


def compare_runs(folders: list[Path], page: Path) -> None:
    """Write `page`: curves of all runs in one chart, outcomes, configs where they differ, answers.

    Raises ConfigError for a folder that is no run's, one named twice or more than six.
    """
    if len(folders) > MOST:
        raise ConfigError(f"{len(folders)} runs, but a page has room for {MOST}; name fewer")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is named twice; name each once")
    alone = len({folder.name for folder in folders}) == len(folders)
    runs = {folder.name if alone else str(folder): load_run(folder) for folder in folders}
    summaries = [summary_rows(run.result) for run in runs.values()]
    keys = dict.fromkeys(key for rows in summaries for key in rows)
    outcomes = [[key, *(rows.get(key, "") for rows in summaries)] for key in keys]
    configs = [yaml.safe_load(run.config) or {} for run in runs.values()]
    answers = _answers(list(runs.values()))
    write_page(
        page, Path(__file__), f"{len(runs)} runs side by side", names=list(runs), outcomes=outcomes,
        differing=list(differences(configs)), runs=runs,
        around=list(differences([*map(_by_split, runs.values())])),
        charts=list(_charts(runs)), answers=answers[:MAX_ANSWERS], asked=len(answers),
        notes=[f"{name}: {note}" for name, run in runs.items() for note in run.notes],
    )  # fmt: skip


def differences(configs: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield [dotted key, value in each config] where they differ; "" where one has none or null."""
    flat = [dict(_flat(config)) for config in configs]
    for key in sorted(set().union(*flat)):
        found = [one.get(key) for one in flat]
        values = ["" if v is None else json.dumps(v, ensure_ascii=False) for v in found]
        if len(set(values)) > 1 and key not in OWN:
            yield [key, *values]


def _by_split(run: Run) -> dict:
    """Return where a run took place, with what its data were by the name of the split."""
    data = run.environment.get("data")
    named = {str(one.get("split")): one for one in data or () if isinstance(one, dict)}
    return run.environment | {"data": named} if named else run.environment


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}".lstrip("."))
    else:
        yield key, value


def _charts(runs: dict[str, Run]) -> Iterator[dict | None]:
    def curves(kind: str, key: str, style: str = "") -> list[tuple]:
        every = enumerate(runs.items())
        return [(n, f"run{i} {style}", points(getattr(r, kind), key)) for i, (n, r) in every]

    targets = {run.result.get("target") for run in runs.values()}
    target = targets.pop() if len(targets) == 1 else None
    unit = " or ".join(sorted({unit_of(run) for run in runs.values()}))
    yield chart("Held-out loss", unit, curves("evals", "cross_entropy", "dots"), target)
    yield chart("Training loss", unit, curves("train", "loss"))
    yield chart("Throughput", "tokens per second", curves("train", "tokens_per_second"),
                from_zero=True)  # fmt: skip


def _answers(runs: list[Run]) -> list[list[str | None]]:
    """Return [prompt, expected, before, answer of each run], those first that are not all alike.

    What stood before training is given once for runs that began alike. Runs that were asked
    nothing have None each; the prompts are those that all the others share.
    """
    found = [{str(r.get("prompt")): r for r in run.generations} for run in runs]
    asked = [one for one in found if one]
    rows = []
    for prompt in asked[0] if asked else ():
        if all(prompt in one for one in asked):
            before = [*dict.fromkeys(one[prompt].get("before") for one in asked)]
            if len(before) > 1:
                texts = ("–" if t is None else str(t).strip() or "(empty)" for t in before)
                before = [" | ".join(texts)]
            after = [one[prompt].get("after") if one else None for one in found]
            rows.append([prompt, asked[0][prompt].get("expected"), *before, *after])
    answered = [3 + number for number, one in enumerate(found) if one]
    return sorted(rows, key=lambda row: len({row[column] for column in answered}) == 1)
