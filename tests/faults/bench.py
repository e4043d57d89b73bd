"""What every fault needs: data, an undisturbed run, commands as processes, and a comparison."""

import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from runs import assert_same

ROOT = Path(__file__).parents[2]
COMPOSER = str(Path(sys.executable).parent / "composer")
ANSWER = 60  # seconds in which every fault is to be answered
# Dropout shows whether random numbers go on as they should; a checkpoint every other step.
OPTIONS = (
    "lora.dropout=0.1", "save_interval=2ba", "eval_interval=30ba", "eval_first=false",
    "progress_bar=false", "global_train_batch_size=8",
)  # fmt: skip


@dataclass
class Outcome:
    """What came of one fault.

    Args:
        detected: the file, or else the place, was named and the exit code was the right one.
        recovered: the same command led to what an undisturbed run gives; None where that was not
            tried, as a person has to act.
        seconds: to the answer; or from the start of the next command to its first new step.
        note: what went wrong, or is worth knowing.
    """

    detected: bool
    recovered: bool | None
    seconds: float
    note: str = ""

    @property
    def is_silent(self) -> bool:
        """Whether nobody would know of it."""
        return not self.detected and not self.recovered


@dataclass
class Bench:
    """A folder to work in, and a source of chance.

    Args:
        folder: data and undisturbed runs are kept in it; trials are made and removed.
        rng: decides when, where and which.
        steps: of every run.
    """

    folder: Path
    rng: random.Random
    steps: int = 60
    environment: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def data(self) -> Path:
        """Return the smoke rows in many small shards."""
        out = self.folder / "data"
        if not (out / "test" / "dataset.json").exists():
            done, _ = self.finish(self.convert(out, "--overwrite"))
            assert done.returncode == 0, done.stderr
        return out

    def convert(self, out: Path, *more: str) -> list[str]:
        """Return the command that writes them."""
        return [
            sys.executable, "src/convert_dataset.py", "--dataset", "embedded", "--max_rows", "400",
            "--test_fraction", "0.1", "--task", "instruct", "--tokenizer", "data/smoke/tokenizer",
            "--max_seq_len", "128", "--size_limit", "8000", "--out_root", str(out), *more,
        ]  # fmt: skip

    def fresh(self, name: str) -> Path:
        """Return a folder for a trial, which is not there yet."""
        self._count += 1
        place = self.folder / "trials" / f"{name}-{self._count}"
        shutil.rmtree(place, ignore_errors=True)
        return place

    def train(self, folder: Path, *options: str, ranks: int = 1) -> list[str]:
        """Return the command of the run."""
        start = [sys.executable] if ranks == 1 else [COMPOSER, "-n", str(ranks)]
        half = "device_train_microbatch_size=4"  # the same in both, and right for two ranks
        config = ["yamls/smoke/finetune.yaml", f"run_folder={folder}", f"data_local={self.data()}"]
        return [
            *start,
            "finetune.py",
            *config,
            *OPTIONS,
            f"max_duration={self.steps}ba",
            half,
            *options,
        ]

    def whole(self, ranks: int = 1) -> Path:
        """Return the run folder of an undisturbed run."""
        folder = self.folder / f"whole-{ranks}"
        if not (folder / "result.json").exists():
            done, _ = self.finish(self.train(folder, ranks=ranks))
            assert done.returncode == 0, done.stderr
        return folder

    def halfway(self) -> Path:
        """Return the folder of a run that was killed near its end, with its two checkpoints."""
        folder = self.folder / "halfway"
        if not list(folder.glob("checkpoints/ba*")):
            process = self.start(self.train(folder))
            wait(lambda: last_step(folder) >= self.steps - 10, process)
            kill_group(process)
        return folder

    def start(self, command: list[str]) -> subprocess.Popen:
        """Start a command in a group of its own."""
        # One thread each, so that a machine with other work to do is only slower.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env=environment,
        )  # fmt: skip
        atexit.register(_end, process)
        return process

    def finish(self, command: list[str], timeout: float = 300) -> tuple[subprocess.Popen, float]:
        """Run a command to its end; what it said is `said`, beside the seconds that it took."""
        began = time.monotonic()
        process = self.start(command)
        hear(process, timeout)
        return process, time.monotonic() - began

    def go_on(self, folder: Path, command: list[str], ranks: int = 1) -> tuple[bool, float, str]:
        """Run the same command again; was it as if nothing had happened, when did it go on, what
        went wrong.
        """
        process, began = self.start(command), time.monotonic()
        seconds = until_it_goes_on(folder, process, began)
        hear(process)
        if process.returncode:
            return False, seconds, process.said[-300:]
        return *self.compare(folder, seconds, ranks), process.said

    def compare(self, folder: Path, seconds: float, ranks: int = 1) -> tuple[bool, float]:
        """Return whether a finished run equals the undisturbed one."""
        try:
            assert_same(self.whole(ranks), folder)
        except AssertionError:
            return False, seconds
        return True, seconds


def hear(process: subprocess.Popen, timeout: float = 300) -> str:
    """Wait for the end of a process, and return and keep what it said."""
    try:
        process.said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process)
        process.said = f"no end within {timeout:g} seconds: " + process.communicate()[0][-200:]
    process.stderr = process.said
    return process.said


def _end(process: subprocess.Popen) -> None:
    """Leave nothing behind when the suite is broken off."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Kill a process and all that it started."""
    os.killpg(process.pid, number)
    process.wait()


def wait(condition: Callable[[], object], process: subprocess.Popen, pause: float = 0.005) -> bool:
    """Wait until something is so; False if the process was over before."""
    while not condition():
        if process.poll() is not None:
            return bool(condition())
        time.sleep(pause)
    return True


def last_step(folder: Path) -> int:
    """Return the last step that a run has logged."""
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    return next((r["step"] for r in map(json.loads, reversed(lines)) if r["kind"] == "train"), 0)


def until_it_goes_on(folder: Path, process: subprocess.Popen, began: float) -> float:
    """Return the seconds until a run has logged anew."""
    log = folder / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    wait(lambda: log.exists() and log.stat().st_mtime_ns > before, process)
    return time.monotonic() - began


def children(process: subprocess.Popen) -> list[int]:
    """Return the processes that a process started itself."""
    command = ["pgrep", "-P", str(process.pid)]
    return [int(line) for line in subprocess.run(command, capture_output=True).stdout.split()]


def living(text: str) -> list[int]:
    """Return the processes of whose command a text is part, but for dead ones and this one."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:  # gone
            continue
    return [number for number in found if number != os.getpid()]


def all_gone(text: str, seconds: float = 10) -> bool:
    """Return whether all processes of a command end within some seconds."""
    deadline = time.monotonic() + seconds
    while living(text):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def flip_bit(path: Path, rng: random.Random) -> int:
    """Change one bit of a file anywhere; return its number."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder by their names."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
