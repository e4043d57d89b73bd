"""Files that are not what was written: flipped bits, cuts, missing shards."""

import shutil
from collections.abc import Callable
from pathlib import Path

from faults.bench import Bench, Outcome, contents, flip_bit

Change = Callable[[Path], object]


def shard(bench: Bench, most: int) -> list[Outcome]:
    """A flipped bit in a shard."""
    return [_data(bench, "*/*.mds", lambda path: flip_bit(path, bench.rng))]


def index(bench: Bench, most: int) -> list[Outcome]:
    """A flipped bit in an index."""
    return [_data(bench, "*/index.json", lambda path: flip_bit(path, bench.rng))]


def ledger(bench: Bench, most: int) -> list[Outcome]:
    """A flipped bit in the manifest of a split."""
    return [_data(bench, "*/dataset.json", lambda path: flip_bit(path, bench.rng))]


def checkpoint(bench: Bench, most: int) -> list[Outcome]:
    """A flipped bit in a checkpoint: the one before is used."""
    return [_checkpoint(bench, "state.pt", lambda path: flip_bit(path, bench.rng))]


def manifest(bench: Bench, most: int) -> list[Outcome]:
    """A flipped bit in the manifest of a checkpoint: the one before is used."""
    return [_checkpoint(bench, "manifest.json", lambda path: flip_bit(path, bench.rng))]


def truncation(bench: Bench, most: int) -> list[Outcome]:
    """Any of these files, cut anywhere."""

    def cut(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: bench.rng.randrange(len(content))])

    kind = bench.rng.choice(
        ["*/*.mds", "*/index.json", "*/dataset.json", "state.pt", "manifest.json"]
    )
    if "/" in kind:
        return [_data(bench, kind, cut)]
    return [_checkpoint(bench, kind, cut)]


def missing(bench: Bench, most: int) -> list[Outcome]:
    """A shard that is not there."""
    return [_data(bench, "*/*.mds", Path.unlink)]


def _data(bench: Bench, pattern: str, change: Change) -> Outcome:
    """Change a file of a split: refused by its name before torch is loaded."""
    data, folder = bench.fresh("data"), bench.fresh("run")
    shutil.copytree(bench.data(), data)
    path = bench.rng.choice(sorted(data.glob(pattern)))
    change(path)
    done, seconds = bench.finish(bench.train(folder, f"data_local={data}"))
    named = done.returncode == 4 and str(path) in done.said and "Traceback" not in done.said
    untouched = {n: c for n, c in contents(data).items() if n != str(path.relative_to(data))}
    whole = contents(bench.data())
    named = named and not folder.exists() and untouched.items() <= whole.items()
    note = "" if named else f"{path.name}, exit {done.returncode}: {done.said[-300:]}"
    shutil.rmtree(data)
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(named, None, seconds, note)


def _checkpoint(bench: Bench, name: str, change: Change) -> Outcome:
    """Change a file of the newest checkpoint: set aside, and an earlier one taken."""
    folder = bench.fresh("run")
    shutil.copytree(bench.halfway(), folder)
    *_, newest = sorted(folder.glob("checkpoints/ba*"), key=lambda path: int(path.name[2:]))
    change(newest / name)
    same, seconds, said = bench.go_on(folder, bench.train(folder))
    named = f"set aside as broken-{newest.name}" in said and str(newest / name) in said
    kept = bool(list(folder.glob("checkpoints/broken-*")))
    fine = named and kept and same
    shutil.rmtree(folder)
    return Outcome(named and kept, same, seconds, "" if fine else f"{name}: {said[-300:]}")
