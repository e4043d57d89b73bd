"""The hidden folder that a conversion works in, until its splits are whole and can be renamed."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overture.data.conversion import Conversion, share_rows
from overture.data.schema import LEDGER, read_ledger, write_aside
from overture.data.sources import Source
from overture.errors import ConfigError, GuardError

PARTIAL = ".partial"


def refuse_drawn_twice(
    home: Path, splits: list[str], origins: Sequence[Any], subset: str | None
) -> None:
    """Raise ConfigError where another split in `home` was drawn from rows of these origins, of the
    same `subset` of a hub dataset.
    """
    for path in home.glob(f"*/{LEDGER}"):
        if path.parent.name in splits:
            continue
        known = read_ledger(path.parent).get("arguments", {})
        theirs = known.get("origins", {}) if known.get("data_subset") == subset else {}
        if not known.get("test_fraction"):  # each split has its own; of parts "NAME of FOLDER"
            theirs = {k: v for k, v in theirs.items() if k.split(" of ")[0] == path.parent.name}
        for other, one in itertools.product(theirs.values(), origins):
            if share_rows(other, one):
                fault = f"{path.parent} was drawn from the same {other[0]}: its rows would be in"
                where = f"{', '.join(splits)} too; choose another --out_root, or delete it"
                raise ConfigError(f"{fault} {where}")


class Workspace(contextlib.AbstractContextManager):
    """`OUT/.partial/`, held by one job at a time; left behind only by one that was killed.

    For an object store the folder is in the temporary directory, the same one for the same target.
    ConfigError if another conversion is at work there; on leaving GuardError if the disk failed.
    """

    def __init__(self, job: Conversion) -> None:
        self.job = job
        self.home = Path(job.out_root)
        if job.remote:  # made here, then uploaded; found again by --resume
            name = hashlib.sha256(job.out_root.encode()).hexdigest()[:16]
            self.home = Path(tempfile.gettempdir()) / f"overture-{name}"
        self.folder = self.home / PARTIAL
        self._facts = self.folder / "facts.json"
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            # The kernel lets go of the lock when its holder dies, however it dies.
            self._lock = os.open(self.home, os.O_RDONLY)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            fault = f"{job.out_root}: another conversion is writing there"
            raise ConfigError(f"{fault}; wait for it, or choose another --out_root") from None
        if not job.resume:
            self._refuse_to_drop_others()
            # Not the folder itself: the lock is on it.
            for path in [*self.home.iterdir()] if job.remote else [self.folder]:
                shutil.rmtree(path, ignore_errors=True)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            os.close(self._lock)
            raise self._unwritable(error) from None
        self._goes_on = self._facts.exists()

    def _unwritable(self, error: OSError) -> ConfigError:
        where = f"--out_root {self.job.out_root}"
        return ConfigError(f"{where}: no folder to write to ({error.strerror})")

    def _refuse_to_drop_others(self) -> None:
        then = json.loads(self._facts.read_text()) if self._facts.is_file() else {}
        ours = json.loads(json.dumps(self.job.identity()["origins"]))
        if then.get("origins", ours) != ours and not self.job.overwrite:
            names = ", ".join(then["origins"])
            fault = f"{self.folder}: a conversion of {names} was interrupted there"
            os.close(self._lock)
            remedy = "finish it by its own command and --resume, delete that, or give --overwrite"
            raise ConfigError(f"{fault}; {remedy}")

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        # A refusal has nothing to go on with; a full disk or ^C leaves the traces for --resume.
        refused = kind is not None and issubclass(kind, ConfigError) and not self._goes_on
        if kind is None or refused:
            done = self.job.remote and kind is None  # and uploaded
            shutil.rmtree(self.home if done else self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.home.rmdir()  # if nothing is in it
        os.close(self._lock)
        if kind is not None and issubclass(kind, OSError):
            fault = f"{self.home}: cannot go on ({error}); what is finished is kept"
            raise GuardError(f"{fault}: run the same command again with --resume") from None

    def bind(self, facts: dict[str, Any]) -> None:
        """Remember what the conversion depends on; going on, ConfigError if it is not as it was."""
        facts = json.loads(json.dumps(facts))
        then = json.loads(self._facts.read_text()) if self._facts.is_file() else {}
        other = next((name for name in facts if then.get(name, facts[name]) != facts[name]), None)
        if other:
            was, now = f"{then[other]!r:.120}", f"{facts[other]!r:.120}"
            fault = f"--resume: the interrupted conversion had {other} {was}, not {now}"
            raise ConfigError(f"{fault}; give the same, or leave --resume out to start over")
        write_aside(self._facts, json.dumps({**then, **facts}))

    def finished(self, split: str, source: Source, facts: dict[str, Any]) -> dict[str, Any] | None:
        """Return, when going on, the ledger of a split that is whole, here or in its place already.

        The kill may have come between two renames, or before an upload. `facts` are those that its
        ledger must have. Raises ConfigError if another split is in its place.
        """
        if not self.job.resume:
            return None
        origin = {"name": source.name, **source.fingerprint}
        ours = json.loads(json.dumps({**facts, "arguments": self.job.identity(), "source": origin}))
        for folder in (self.folder / split, self.place(split)):
            if (folder / LEDGER).is_file():
                ledger = read_ledger(folder)
                if {name: ledger.get(name) for name in ours} == ours:
                    return ledger
        if not self.job.overwrite and self.place(split).exists():
            fault = f"{self.place(split)} is there already and is not of this conversion"
            raise ConfigError(f"{fault}; give --overwrite to replace it")
        return None

    def place(self, split: str) -> Path:
        """Return where a split goes, on this machine."""
        return self.home / Path(self.job.place(split)).name

    def move_into_place(self, split: str) -> None:
        """Rename a finished split to its place; an old one goes with this folder."""
        place = self.place(split)
        aside = self.folder / place.name
        if not aside.exists():
            return  # moved before the interruption
        if place.exists():
            os.rename(place, self.folder / f"old-{place.name}")
        os.rename(aside, place)
