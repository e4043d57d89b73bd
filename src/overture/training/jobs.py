"""Runs of `finetune.py` as processes: as many at once as there is room for, each with its log."""

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from tqdm import tqdm

from overture.config.load import child_environment
from overture.config.secrets import redact
from overture.data.schema import write_aside
from overture.errors import EXIT_GUARD, GOES_ON, Preempted

FINETUNE = Path(__file__).parents[3] / "finetune.py"
HOPELESS = (2, 4)  # exit codes of a wrong config and of broken data: the next try meets the same
GRACE = 60.0  # seconds to save and end in, when all is to stop


class Job(NamedTuple):
    """A run by the name of its run folder and its config; `needs` is one to be finished before."""

    name: str
    config: dict[str, Any]
    needs: str | None = None


def run_jobs(
    jobs: Sequence[Job], folder: Path, slots: Sequence[int | None], retries: int
) -> dict[str, int]:
    """Run the jobs that are not finished, one in each of the slots, and return those that failed.

    A slot is a CUDA device, None on a CPU. In `folder` a job has its run folder and, in `jobs`, its
    config and its log. One that fails is tried again `retries` times, from its newest checkpoint.
    Returns exit codes by name, of a job whose `needs` failed that one's. Raises Preempted on
    SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, when the jobs have saved and ended.
    """
    waiting = [job for job in jobs if not is_finished(folder / job.name)]
    done = {job.name for job in jobs} - {job.name for job in waiting}
    failed: dict[str, int] = {}
    tries = dict.fromkeys((job.name for job in jobs), 0)
    free, running = list(slots), {}
    bar = tqdm(total=len(jobs), initial=len(done), unit=" jobs", disable=None)  # on a terminal
    if done:
        bar.write(f"{len(done)} of {len(jobs)} jobs are finished and kept")
    with bar, ended(running):
        while waiting or running:
            for job in list(waiting):
                if job.needs in failed:
                    failed[job.name] = failed[job.needs]
                    bar.write(f"{job.name}: not run, as {job.needs} failed")
                elif free and (job.needs is None or job.needs in done):
                    slot, tries[job.name] = free.pop(0), tries[job.name] + 1
                    running[_start(job, folder, slot, len(slots))] = job, slot
                else:
                    continue
                waiting.remove(job)
            time.sleep(0.2)
            shown = [] if bar.disable else [_progress(folder, job) for job, _ in running.values()]
            bar.set_postfix_str(", ".join(shown))
            for process in [process for process in running if process.poll() is not None]:
                job, slot = running.pop(process)
                free.append(slot)
                code, fault = process.returncode, f"failed with exit code {process.returncode}"
                if is_finished(folder / job.name):
                    done.add(job.name)
                    bar.update()
                    bar.write(f"{job.name}: {_outcome(folder / job.name)}")
                elif tries[job.name] <= retries and code not in HOPELESS:
                    bar.write(f"{job.name}: {fault}; once more")
                    waiting.insert(0, job)
                else:
                    failed[job.name] = code if code > 0 else EXIT_GUARD  # below 0: killed
                    bar.write(f"{job.name}: {fault}: {_last_words(folder, job)}")
    return failed


def _start(job: Job, folder: Path, slot: int | None, parallel: int) -> subprocess.Popen:
    path = folder / "jobs" / f"{job.name}.yaml"
    text = OmegaConf.to_yaml(OmegaConf.create(job.config))
    write_aside(path, redact(text))
    log = path.with_suffix(".log")
    if redact(text) != text:  # what the job reads is kept from the folder, and from others
        path = private_folder() / path.name
        path.write_text(text, encoding="utf-8")
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, str(FINETUNE), str(path)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            env=child_environment(slot, parallel),
        )  # fmt: skip


def private_folder() -> Path:
    """Return a new folder that is this process's alone, and ends with it."""
    folder = tempfile.mkdtemp(prefix="overture-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def ended(
    running: dict[subprocess.Popen, Any], saved: str = f"what was running has saved; {GOES_ON}"
) -> Iterator[None]:
    """Leave no process behind; on a signal to stop they save, and Preempted says what is kept."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    asking = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup has made deaf to it
        asking.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in asking}
    try:
        yield
    except KeyboardInterrupt:
        raise Preempted(None, saved) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        while (left := [p for p in running if not _is_over(p)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in left:
            process.kill()
        for process in running:
            process.poll()


def _is_over(process: subprocess.Popen) -> bool:
    # Not by its poll(), which an exception from a signal, in the wrong line, leaves locked.
    with suppress(ChildProcessError):  # nobody waits for it any more
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, process.pid, how) is not None
    return True


def is_finished(folder: Path) -> bool:
    """Return whether a run came to its end."""
    from overture.training.run_folder import FINISHED  # with torch, which a wrong config needs not

    path = folder / "result.json"
    return path.is_file() and json.loads(path.read_text("utf-8"))["status"] in FINISHED


def _progress(folder: Path, job: Job) -> str:
    """Return the last step of a job that runs, from the end of its log."""
    path = folder / job.name / "metrics.jsonl"
    if not path.is_file():
        return f"{job.name} starts"
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 1_000, 0))
        steps = re.findall(rb'"step": (\d+), .*\n', file.read())
    return f"{job.name} step {int(steps[-1]) if steps else 0}"


def _outcome(folder: Path) -> str:
    metrics = json.loads((folder / "result.json").read_text("utf-8"))["metrics"]
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _last_words(folder: Path, job: Job) -> str:
    lines = (folder / "jobs" / f"{job.name}.log").read_text("utf-8", "replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
