"""Fixtures: the smoke data of `make venv`, the real data where it is, doors as processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
# What a hub would answer is not under test; an attempt to reach it should fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def smoke() -> Path:
    """The folder of the smoke tokenizer and shards."""
    folder = ROOT / "data" / "smoke"
    if not (folder / ".written").exists():
        pytest.fail("data/smoke is missing: run the tests with `make test`, which writes it")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets."""
    folder = os.environ.get("OVERTURE_DATA")
    if not folder:
        pytest.skip("OVERTURE_DATA is not set: no real datasets at hand")
    return Path(folder)


@pytest.fixture(autouse=True)
def freed(monkeypatch):
    """Free with each test what Streaming keeps until the process ends.

    Every dataset opens six files for each one made before it, so that a hundred of them exhaust
    any limit.
    """
    from streaming.base.shared import memory  # after the variable above is set

    cleanups: list[Callable[[], None]] = []
    monkeypatch.setattr(memory, "atexit", SimpleNamespace(register=cleanups.append))
    yield
    gc.collect()  # loaders that the test has dropped stop their workers
    gc.freeze()  # what the imports have made is here to stay, and costs a third of a second each
    for cleanup in cleanups:
        cleanup()


@pytest.fixture
def run_door(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a door of the repository as a user would, and return its output and exit code."""

    def run(*command: object, launcher: str = sys.executable) -> subprocess.CompletedProcess:
        return subprocess.run(
            [launcher, *map(str, command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
