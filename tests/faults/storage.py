"""Stores, disks and shared memory that fail: an S3 server of our own, a small tmpfs, dead jobs."""

import http.server
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from faults.bench import ANSWER, Bench, Outcome, contents, hear, kill_group, last_step, wait
from faults.kills import leaked

MEBIBYTE = 2**20


class Store(http.server.ThreadingHTTPServer):
    """As much of S3 as a download needs, from a folder; `fault(key, times)` says how it fails."""

    def __init__(self, folder: Path, fault: Callable[[str, int], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.asked = folder, fault, Counter()
        self.over = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers HEAD and GET of /bucket/key."""

    server: Store

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        key = self.path.split("?")[0].split("/", 2)[2]
        path = self.server.folder / key
        self.server.asked[key] += 1
        fault = self.server.fault(key, self.server.asked[key])
        if fault == "silent" and body:
            self.server.over.wait(120)
            return
        missing = fault == "missing" or not path.is_file()
        if missing or fault == "500":
            self.send_error(404 if missing else 500)
            return
        content = path.read_bytes()
        if fault == "wrong" and body:
            content = content[:-1] + bytes([content[-1] ^ 16])
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        for start in range(0, len(content) if body else 0, 1 + len(content) // 4):
            self.wfile.write(content[start : start + 1 + len(content) // 4])
            self.wfile.flush()
            time.sleep(0.1 * (fault == "slow"))

    def log_message(self, *_) -> None:
        """Say nothing."""


@contextmanager
def store(bench: Bench, fault: Callable[[str, int], str]):
    """Serve the data, with a fault."""
    server = Store(bench.data(), fault)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bench.environment = {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    try:
        yield
    finally:
        bench.environment = {}
        server.over.set()
        server.shutdown()
        server.server_close()


def _recovers(bench: Bench, fault: str, times: int) -> list[Outcome]:
    """A store that fails a while is waited for: training is as if nothing had happened."""
    folder, cache = bench.fresh("run"), bench.fresh("cache")
    command = bench.train(folder, f"data_local={cache}", "data_remote=s3://bucket")
    with store(bench, lambda key, n: fault if key.endswith(".mds") and n <= times else ""):
        same, seconds, said = bench.go_on(folder, command)
    arrived = contents(cache).items() >= contents(bench.data() / "none").items()
    shutil.rmtree(cache)
    shutil.rmtree(folder, ignore_errors=True)
    note = "" if same else said[-300:]
    return [Outcome(same and arrived, same, seconds, note)]


def _answers(bench: Bench, fault: str) -> list[Outcome]:
    """A store that fails for good: the run ends, naming the object, and goes on once it is well."""
    folder, cache = bench.fresh("run"), bench.fresh("cache")
    files = sorted(p for p in bench.data().glob("train/*") if p.name != "rejected.jsonl")
    path = bench.rng.choice([p for p in files if p.suffix in (".mds", ".json")])
    command = bench.train(folder, f"data_local={cache}", "data_remote=s3://bucket")
    with store(bench, lambda key, n: fault if key == f"train/{path.name}" else ""):
        process, began = bench.start(command), time.monotonic()
        said = hear(process, 4 * ANSWER)
        seconds = time.monotonic() - began
    named = process.returncode in (2, 4) and f"s3://bucket/train/{path.name}" in said
    named = named and "Traceback" not in said and seconds < ANSWER
    with store(bench, lambda key, n: ""):
        same, _, again = bench.go_on(folder, command)
    shutil.rmtree(cache)
    shutil.rmtree(folder, ignore_errors=True)
    note = "" if named else f"{path.name}, exit {process.returncode}: {said[-400:]}"
    return [Outcome(named, same, seconds, note if same else f"{note} {again[-300:]}")]


def error_500_for_a_while(bench: Bench, most: int) -> list[Outcome]:
    """S3 answers 500 twice for every shard."""
    return _recovers(bench, "500", 2)


def error_500(bench: Bench, most: int) -> list[Outcome]:
    """S3 answers 500 for an object, for good."""
    return _answers(bench, "500")


def slow(bench: Bench, most: int) -> list[Outcome]:
    """S3 takes its time for every shard."""
    return _recovers(bench, "slow", 99)


def silent(bench: Bench, most: int) -> list[Outcome]:
    """S3 takes the request for an object and never answers."""
    return _answers(bench, "silent")


def wrong_bytes_once(bench: Bench, most: int) -> list[Outcome]:
    """S3 sends every shard with a changed bit, the first time."""
    return _recovers(bench, "wrong", 2)  # a download asks for the size first


def wrong_bytes(bench: Bench, most: int) -> list[Outcome]:
    """S3 sends an object with a changed bit, each time."""
    return _answers(bench, "wrong")


def missing_object(bench: Bench, most: int) -> list[Outcome]:
    """An object is not in S3."""
    return _answers(bench, "missing")


@contextmanager
def small_disk(bench: Bench, size: int):
    """Mount a tmpfs of some bytes; yields a folder on it, and a way to make it larger."""
    place = bench.folder / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield (
            place,
            lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True),
        )
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def may_mount() -> bool:
    """Return whether this process may mount anything."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def full_disk_saving(bench: Bench, most: int) -> list[Outcome]:
    """The disk is full when a checkpoint is to be written."""
    with small_disk(bench, 64 * MEBIBYTE) as (disk, _):
        folder = disk / "run"
        command = bench.train(folder)
        process = bench.start(command)
        step = bench.rng.randrange(5, bench.steps - 10)
        if not wait(lambda: last_step(folder) >= step, process):
            return [Outcome(False, False, 0, hear(process)[-300:])]
        began = time.monotonic()
        filler = disk / "filler"
        with suppress(OSError):
            filler.write_bytes(b"x" * (64 * MEBIBYTE))
        said = hear(process, ANSWER)
        seconds = time.monotonic() - began
        named = process.returncode == 5 and str(folder) in said and "Traceback" not in said
        named = named and not list(folder.glob("checkpoints/.ba*"))
        filler.unlink()
        same, _, again = bench.go_on(folder, command)
    note = "" if named and same else f"exit {process.returncode}: {said[-400:]} {again[-300:]}"
    return [Outcome(named, same, seconds, note)]


def full_disk_converting(bench: Bench, most: int) -> list[Outcome]:
    """The disk is full when a shard is to be written; then it is larger, and --resume."""
    size = sum(map(len, contents(bench.data()).values()))
    with small_disk(bench, max(int(size * bench.rng.uniform(0.1, 0.9)), 4096)) as (disk, enlarge):
        out = disk / "data"
        done, seconds = bench.finish(bench.convert(out))
        named = done.returncode == 5 and str(out) in done.said and "Traceback" not in done.said
        enlarge(64 * MEBIBYTE)
        again, _ = bench.finish(bench.convert(out, "--resume"))
        same = again.returncode == 0 and contents(out) == contents(bench.data())
    note = f"exit {done.returncode}: {done.said[-300:]} {again.said[-300:]}"
    return [Outcome(named, same, seconds, "" if named and same else note)]


def leaked_shared_memory(bench: Bench, most: int) -> list[Outcome]:
    """Shared memory of a killed job beside that of a live one."""
    before = leaked()
    live, dead, new = bench.fresh("live"), bench.fresh("dead"), bench.fresh("new")
    long = ("max_duration=100000ba", "eval_interval=100000ba", "save_interval=100000ba")
    neighbour = bench.start(bench.train(live, *long, "train_loader.num_workers=1"))
    wait(lambda: last_step(live) >= 1, neighbour)
    killed = bench.start(bench.train(dead, *long, "train_loader.num_workers=1"))
    wait(lambda: last_step(dead) >= 1, killed)
    kill_group(killed)
    wait(leaked, neighbour)  # its workers die a moment after their parent
    lost = leaked() - before
    same, seconds, said = bench.go_on(new, bench.train(new))
    step = last_step(live)
    unharmed = wait(lambda: last_step(live) > step, neighbour)
    kill_group(neighbour, signal.SIGTERM)
    unharmed = unharmed and neighbour.returncode == 75
    left = leaked() - before
    for folder in (live, dead, new):
        shutil.rmtree(folder)
    fine = same and unharmed and not left
    note = "" if fine else f"neighbour unharmed: {unharmed}, left: {sorted(left)} {said[-200:]}"
    return [Outcome(fine and bool(lost), fine, seconds, note)]


def one_cache(bench: Bench, most: int) -> list[Outcome]:
    """Two runs with one cache: the second is refused, the first is not disturbed."""
    first, second, cache = bench.fresh("first"), bench.fresh("second"), bench.fresh("cache")
    where = (f"data_local={cache}", f"data_remote={bench.data().resolve()}")
    command = bench.train(first, *where)
    process = bench.start(command)
    wait(lambda: last_step(first) >= 1, process)
    process.send_signal(signal.SIGSTOP)  # so that it is sure to be there all the time
    done, seconds = bench.finish(bench.train(second, *where))
    process.send_signal(signal.SIGCONT)
    hear(process)
    named = done.returncode == 2 and f"data_local: {cache}" in done.said
    same = process.returncode == 0 and bench.compare(first, 0)[0]
    for folder in (first, second, cache):
        shutil.rmtree(folder, ignore_errors=True)
    note = "" if named and same else f"exit {done.returncode}: {done.said[-300:]}"
    return [Outcome(named, same, seconds, note)]
