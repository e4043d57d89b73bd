"""Processes that end: kill -9, SIGTERM, one rank, one worker, all of a group."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from faults.bench import (
    ANSWER,
    Bench,
    Outcome,
    all_gone,
    children,
    contents,
    hear,
    kill_group,
    last_step,
    until_it_goes_on,
    wait,
)

CHAIN = 5  # kills of one run
SHARED = Path("/dev/shm")


def training(bench: Bench, most: int) -> list[Outcome]:
    """Kill -9 of a run at random moments."""
    folder = bench.fresh("kill")
    return _chain(bench, folder, bench.train(folder), _steps(bench, most), _at(bench, folder))


def saving(bench: Bench, most: int) -> list[Outcome]:
    """Kill -9 of a run while it writes a checkpoint."""
    folder, parts = bench.fresh("kill-saving"), []
    steps = sorted(bench.rng.sample(range(4, bench.steps - 4, 2), min(most, CHAIN)))

    def part(step: int = 0) -> bool:
        found = folder.glob("checkpoints/.ba*")
        return any(int(place.name.split(".")[1][2:]) >= step for place in found)

    def at(step: int, process) -> bool:
        while wait(lambda: part(step), process, pause=0.0002):
            time.sleep(bench.rng.uniform(0, 0.01))
            process.send_signal(signal.SIGSTOP)  # so that it is sure to be in the middle
            if part(step):
                return True
            process.send_signal(signal.SIGCONT)
        return False

    outcomes = _chain(bench, folder, bench.train(folder), steps, at, lambda: parts.append(part()))
    for outcome, left in zip(outcomes, parts, strict=True):
        if not left:
            outcome.detected, outcome.note = False, f"{outcome.note} left no part"
    return outcomes


def converting(bench: Bench, most: int) -> list[Outcome]:
    """Kill -9 of a conversion at random moments, then --resume."""
    out, kills, answer = bench.fresh("kill-converting"), 0, 0.0
    command = bench.convert(out)
    bench.data()
    while True:
        process, began = bench.start(command), time.monotonic()
        command = bench.convert(out, "--resume")
        there = wait(lambda: (out / ".partial").exists(), process)
        time.sleep(bench.rng.uniform(0, 0.6))
        if kills == min(most, CHAIN) or not there or process.poll() is not None:
            break
        kill_group(process)
        kills += 1
    said = hear(process)
    answer = time.monotonic() - began
    same = process.returncode == 0 and contents(out) == contents(bench.data())
    shutil.rmtree(out, ignore_errors=True)
    return [Outcome(same, same, answer, "" if same else said[-300:]) for _ in range(kills)]


def group(bench: Bench, most: int) -> list[Outcome]:
    """Kill -9 of the launcher, two ranks and their loaders' workers at once."""
    folder = bench.fresh("kill-group")
    before = leaked()
    command = bench.train(folder, "train_loader.num_workers=1", ranks=2)
    outcomes = _chain(bench, folder, command, _steps(bench, most), _at(bench, folder), ranks=2)
    left = leaked() - before
    for outcome in outcomes if left else ():
        outcome.detected = outcome.recovered = False
        outcome.note += f" left in shared memory: {sorted(left)}"
    return outcomes


def rank(bench: Bench, most: int) -> list[Outcome]:
    """Kill -9 of one of two ranks: the other must not wait for it."""
    said = "another rank ended"
    return _answered(bench, "rank", said, most, bench.train, ranks=2)


def worker(bench: Bench, most: int) -> list[Outcome]:
    """Kill -9 of one of two workers of the loader."""
    said, workers = "a worker of the loader died", "train_loader.num_workers=2"
    return _answered(bench, "worker", said, most, bench.train, workers, code=5)


def sigterm(bench: Bench, most: int) -> list[Outcome]:
    """SIGTERM: saved within 25 seconds, exit code 75."""
    said = "stopped as asked, saved at step"
    return _answered(bench, "sigterm", said, most, bench.train, whom=None, code=75, within=25)


def leaked() -> set[str]:
    """Return the names in shared memory that no living process has mapped."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # gone
            mapped |= {line.split("/dev/shm/")[1] for line in maps.open() if "/dev/shm/" in line}
    return set(os.listdir(SHARED)) - {name.rstrip() for name in mapped}


def _steps(bench: Bench, most: int) -> list[int]:
    return sorted(bench.rng.sample(range(1, bench.steps - 2), min(most, CHAIN)))


def _at(bench: Bench, folder: Path):
    """Return what waits for a step and a moment more, of computing, logging or saving."""

    def at(step: int, process) -> bool:
        there = wait(lambda: last_step(folder) >= step, process)
        time.sleep(bench.rng.uniform(0, 0.1))
        return there

    return at


def _chain(bench, folder, command, steps, at, after=lambda: None, ranks=1) -> list[Outcome]:
    """Kill a run at each of some steps, go on each time, and compare what it ends with."""
    seconds, notes = [], []
    for step in steps:
        process, began = bench.start(command), time.monotonic()
        if folder.exists():
            seconds.append(until_it_goes_on(folder, process, began))
        if not at(step, process):
            notes.append(f"over before step {step}: {hear(process)[-300:]}")
            break
        kill_group(process)
        if not all_gone(str(folder)):
            notes.append("left a process behind")
        after()
    same, last, said = bench.go_on(folder, command, ranks)
    seconds.append(last)
    if not same:
        notes.append(f"differs, or did not go on: {said[-300:]}")
    shutil.rmtree(folder)
    note = "; ".join(notes)
    return [Outcome(same and not note, same and not note, s, note) for s in seconds[-len(steps) :]]


def _answered(
    bench, name, sentence, most, train, *options, ranks=1, whom=-1, code=None, within=ANSWER
):
    """Do something to a part of a run: it has to end by itself, in a `sentence`, and go on."""
    folder, outcomes = bench.fresh(name), []
    command = train(folder, *options, ranks=ranks)
    for step in sorted(bench.rng.sample(range(2, bench.steps - 5), min(most, CHAIN))):
        process, began = bench.start(command), time.monotonic()
        if folder.exists():  # its log may know of this step already
            until_it_goes_on(folder, process, began)
        if not _at(bench, folder)(step, process):
            outcomes.append(Outcome(False, False, 0, f"was over: {hear(process)[-300:]}"))
            break
        began = time.monotonic()
        if whom is None:
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(bench.rng.choice(children(process)[-2:]), signal.SIGKILL)
        said = hear(process, ANSWER)
        seconds = time.monotonic() - began
        fine = process.returncode == code if code else process.returncode != 0
        fine = fine and sentence in said and "the same command goes on" in said
        fine = fine and seconds < within and "Traceback" not in said and all_gone(str(folder))
        outcomes.append(Outcome(fine, None, seconds, "" if fine else said[-500:]))
    same, _, said = bench.go_on(folder, command, ranks)
    for outcome in outcomes:
        outcome.recovered = same
        outcome.note += "" if same else f" differs, or did not go on: {said[-300:]}"
    shutil.rmtree(folder)
    return outcomes
