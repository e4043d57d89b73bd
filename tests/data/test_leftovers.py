"""Shared memory of killed processes goes, that of live ones stays: both for real."""

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN

from overture.data.leftovers import SHARED_MEMORY, remove_leftovers
from overture.data.streams import TokenStream

# Reads an epoch with two worker processes per line of input.
READER = """
import sys
from streaming import StreamingDataLoader
from overture.data.streams import TokenStream
stream = TokenStream(local=sys.argv[1], split="train", batch_size=4)
loader = StreamingDataLoader(stream, batch_size=4, num_workers=2, collate_fn=list)
print(f"{stream._shm_prefix_int:06}", flush=True)
for line in sys.stdin:
    print(sum(map(len, loader)), flush=True)
    if line == "stay\\n":
        rows = iter(loader)
        next(rows)
        print("amid", flush=True)
"""


def leases_work() -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except (OSError, AttributeError):
        return False
    return True


pytestmark = pytest.mark.skipif(not leases_work(), reason="no write leases on /dev/shm here")


@pytest.fixture
def reader(smoke, tmp_path, monkeypatch):
    """Start a reading process in a group of its own; its lock files lie in `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", READER, str(smoke / "text")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
            cwd=Path(__file__).parents[2] / "src", env={**os.environ, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def ask(process, line="read") -> str:
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def segments(number: str) -> set[str]:
    names = {f"{number}_{name}" for name in SHM_TO_CLEAN}
    return names & set(os.listdir(SHARED_MEMORY))


def locks(number: str, folder: Path) -> set[str]:
    names = {f"{number}_{name}" for name in (BARRIER_FILELOCK, CACHE_FILELOCK)}
    return names & set(os.listdir(folder))


def test_only_what_killed_processes_left_is_removed(reader, smoke, tmp_path):
    live, living = reader()
    killed, dead = reader()
    assert living != dead
    assert ask(live) == ask(killed, "stay") == "106"
    assert killed.stdout.readline() == "amid\n"  # with its workers at work
    remove_leftovers()
    assert segments(dead) and locks(dead, tmp_path)  # in use, so they stay
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert segments(dead) and locks(dead, tmp_path)
    kept, kept_locks = segments(living), locks(living, tmp_path)
    assert kept and kept_locks
    for _ in range(100):  # the workers die a moment after their parent
        remove_leftovers()
        if not segments(dead):
            break
        time.sleep(0.05)
    assert not segments(dead) and not locks(dead, tmp_path)
    assert segments(living) == kept and locks(living, tmp_path) == kept_locks
    assert [ask(live), ask(live)] == ["106", "106"]
    again = TokenStream(local=str(smoke / "text"), split="train", batch_size=1)
    assert len(list(again)) == 106


def test_held_lock_and_foreign_names_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stale, held = tmp_path / "900000_barrier_filelock", tmp_path / "900001_cache_filelock"
    others = [tmp_path / name for name in ("000000_filelock", "x_cache_filelock", "90_locals")]
    for path in (stale, held, *others):
        path.touch()
    with held.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers()
    assert not stale.exists() and held.exists() and all(path.exists() for path in others)


def test_tensor_that_was_on_its_way_goes_unless_it_is_mapped():
    name = SHARED_MEMORY / "torch_1_2_900003"
    try:
        name.write_bytes(b"\0" * 4096)
        with name.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 4096)
        remove_leftovers()
        assert name.exists()
        mapping.close()
        remove_leftovers()
        assert not name.exists()
    finally:
        name.unlink(missing_ok=True)


def test_segments_that_are_mapped_but_closed_stay():
    # A dataset's segments may be held by nothing but a mapping, or a part of them by nobody.
    name = SHARED_MEMORY / "900002_locals"
    partner = SHARED_MEMORY / "900002_epoch_data"
    try:
        name.write_bytes(b"\0" * 4096)
        partner.write_bytes(b"\0")
        with name.open("r+b") as file:
            mapping = mmap.mmap(file.fileno(), 4096)
        remove_leftovers()
        assert name.exists() and partner.exists()
        mapping.close()
        remove_leftovers()
        assert not name.exists() and not partner.exists()
    finally:
        name.unlink(missing_ok=True)
        partner.unlink(missing_ok=True)
