"""Every shipped YAML is checked; those that can run here are run."""

import json
from pathlib import Path

import pytest

from overture.config.load import load_config, load_glue
from overture.config.schema import DOORS
from overture.training.glue import plan
from overture.training.glue_tasks import TASKS

ROOT = Path(__file__).parents[1]
EVERY = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("yamls/**/*.yaml"))
GLUE = [path for path in EVERY if "/glue/" in path]
YAMLS = [path for path in EVERY if path not in GLUE]
# eval cross-entropy of a smoke run
MOST = {"causal_lm": 5.5, "masked_lm": 6.5, "instruct": 6.8, "classify": 1.9}


def load(path: str, *overrides: str):
    return load_config([str(ROOT / path), *overrides], tuple(DOORS))


def test_there_are_some():
    assert len(YAMLS) >= 7


def header(path: str) -> str:
    lines = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    assert lines[0].startswith("# Purpose: ")
    text = "\n".join(lines)
    for word in ("Hardware: ", "Launch: ", "Expected: "):
        assert f"# {word}" in text, word
    return text


@pytest.mark.parametrize("path", GLUE)
def test_glue_loads_and_every_job_of_it_fits(path):
    config = load_glue([str(ROOT / path)])
    assert f"Launch: python src/evaluate_glue.py {path}" in header(path)
    counts = [1 if TASKS[task].one_seed else len(config.seeds) for task in config.tasks]
    assert len(plan(config)) == sum(counts) + ("mnli" in config.tasks)


@pytest.mark.parametrize("path", YAMLS)
def test_loads_and_says_what_it_is(path):
    config, text = load(path), header(path)
    assert f"composer {DOORS[config.task]} {path}" in text or "make dolly" in text
    assert config.run_name == Path(path).stem or config.run_name in path or "quickstart" in path
    # The smoke run of any YAML.
    assert load(path, "max_duration=16ba").max_duration == "16ba"


@pytest.mark.parametrize("path", [p for p in YAMLS if "/smoke/" in p])
def test_smoke_runs_do_what_their_headers_say(path, run_door, smoke, tmp_path):
    config = load(path)
    done = run_door(DOORS[config.task], path, f"run_folder={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["steps"] == 16
    assert result["eval_cross_entropy"] < MOST[config.task]
    assert (tmp_path / "run" / "report.html").is_file()
    assert "Warning" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
