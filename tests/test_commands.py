"""Every command of README, guides and YAML headers: its door, options and files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from overture.config.load import load_config, load_glue
from overture.config.schema import DOORS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = "".join((ROOT / "docs" / f"{n}.md").read_text() for n in ("pretraining", "finetuning"))


def commands() -> list[str]:
    found = []
    for block in re.findall(r"```\n(.*?)```", README + GUIDES, re.DOTALL):
        found += [line.split("   #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    for path in ROOT.glob("docs/*.md"):
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"^    (python src/.*)$", text, re.MULTILINE)
    for path in ROOT.glob("yamls/**/*.yaml"):
        lines = [x[2:] for x in path.read_text().splitlines() if x.startswith("# ")]
        text = "\n".join(lines).replace("\\\n", " ")
        found += re.findall(r"^ *(python src/.*)$", text, re.MULTILINE)
        launched = r"(?:Launch|One node|Many nodes|Smoke run): "
        launched += r"((?:composer|python src/evaluate_glue.py) .*)$"
        found += re.findall(launched, text, re.MULTILINE)
    return sorted({" ".join(c.split()) for c in found if c})


def test_the_readme_has_its_two_commands():
    assert "make quickstart" in commands()
    assert "make test" in commands()
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets(command):
    done = subprocess.run(
        [*shlex.split(command.replace("...", "x")), "--dry-run"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("composer ")])
def test_composer_lines_load(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("=...", "=1"))
    number = next(i for i, word in enumerate(words) if word.endswith(".py"))
    door, arguments = words[number], words[number + 1 :]
    options = dict(zip(words[1:number:2], words[2:number:2], strict=True))
    world = options.get("--world_size", options.get("-n", "1"))
    monkeypatch.setenv("WORLD_SIZE", world)  # batches must divide
    task = tuple(task for task in DOORS if DOORS[task] == door)
    load_config(arguments, task)
    if world == "1":  # then the launcher starts a rank for each GPU
        monkeypatch.setenv("WORLD_SIZE", "8")
        load_config(arguments, task)


@pytest.mark.parametrize("command", [c for c in commands() if "evaluate_glue.py" in c])
def test_glue_lines_load(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_glue(shlex.split(command)[2:])


@pytest.mark.parametrize("command", [c for c in commands() if re.search("^python .* --", c)])
def test_options_of_python_lines(command):
    _, door, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, door, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for option in [a for a in arguments if a.startswith("--")]:
        assert option in done.stdout, option


def test_every_file_of_the_tour_is_there():
    table = README.split("## What is in the box")[1]
    for name in re.findall(r"`([\w./-]+)`", table):
        if "/" in name or name.endswith(".py"):
            found = (ROOT / name).exists() or list(ROOT.glob(f"yamls/{name}"))
            assert found, name


def test_makefile_recipe_of_the_quickstart_uses_shipped_files():
    text = (ROOT / "Makefile").read_text()
    for path in re.findall(r"(?:yamls|src)/[\w./-]+\.(?:yaml|py)", text):
        assert (ROOT / path).is_file(), path
