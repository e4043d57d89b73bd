"""What to convert and how: the arguments of `src/convert_dataset.py`, and what fits what."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from overture.errors import ConfigError

_TRUNCATE = ("truncate_prompt", "drop", "error")
# task -> what may be done with a row of more than max_seq_len tokens, the default first
OVERFLOWS = {
    "text": ("split", "truncate", "drop", "error"),
    **dict.fromkeys(("instruct", "chat", "seq2seq", "classify"), _TRUNCATE),
    "jsonl": (),
}
PACKED = ("text", "instruct", "chat")
_SHARDS = tuple(task for task in OVERFLOWS if task != "jsonl")
# Options that are for some tasks only; any other is for all.
TASKS = {
    **dict.fromkeys(("tokenizer", "max_seq_len", "overflow", "packing", "compression"), _SHARDS),
    **dict.fromkeys(("size_limit", "processes", "resume", "engine"), _SHARDS),
    **dict.fromkeys(("bos_text", "eos_text", "wrap"), ("text",)),
    **dict.fromkeys(("labels", "regression"), ("classify",)),
    "threads": ("chat",),
    "stratify": tuple(task for task in OVERFLOWS if task != "chat"),  # it divides by beginnings
}
OPTIONS = {"wrap": "--no_wrap", "packing": "--packing or --concat_tokens"}  # otherwise as named
_SLICE = re.compile(r"^(?P<name>.+?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?$")


class Origin(NamedTuple):
    """Where the rows of a split come from: rows start to stop of a dataset's own split."""

    dataset: str
    split: str = "train"
    start: int = 0
    stop: int | None = None


def share_rows(one: Sequence[Any], other: Sequence[Any], same: bool = False) -> bool:
    """Return whether two origins share rows; `same` says that their sources are one by any name."""
    (*one_source, start, stop), (*other_source, begin, end) = one, other
    apart = (stop is not None and stop <= begin) or (end is not None and end <= start)
    return (same or one_source == other_source) and not apart


@dataclass(frozen=True)
class Conversion:
    """One conversion. `origins` says what becomes which split; see `check` for what fits what."""

    origins: dict[str, Origin]
    task: str  # text | instruct | chat | seq2seq | classify | jsonl
    out_root: str  # a folder, or s3://, gs://, ...
    # Reading.
    data_subset: str | None = None
    revision: str | None = None
    fields: dict[str, str] = field(default_factory=dict)  # ours -> theirs
    columns: tuple[str, ...] = ()  # of a csv or tsv file that has no header
    text_rows: str = "file"  # what is a row of a plain text file: file | line | block
    threads: str = "all"  # of conversation trees: all | best
    max_rows: int | None = None
    max_rejected: float = 0.01  # share of malformed rows that is put up with
    # Dividing.
    test_fraction: float = 0.0
    stratify: str | None = None
    seed: int = 17
    dedupe: bool = False
    # Encoding.
    tokenizer: str | None = None
    prompt_template: str | None = None  # a built-in one or a file; default: the task's own
    max_seq_len: int = 2048
    overflow: str | None = None  # default: the task's first in OVERFLOWS
    packing: str | None = None  # best_fit | concat | none
    bos_text: str | None = None
    eos_text: str | None = None
    wrap: bool = True
    labels: tuple[str, ...] = ()
    regression: bool = False
    # Writing.
    compression: str | None = None
    size_limit: int = 1 << 26
    processes: int = 1
    engine: str = "local"  # local | spark
    overwrite: bool = False
    resume: bool = False

    def identity(self) -> dict[str, Any]:
        """Return the arguments that decide what is written; where and how fast is no part."""
        apart = ("out_root", "processes", "engine", "overwrite", "resume")
        return {name: value for name, value in vars(self).items() if name not in apart}

    def splits(self) -> list[str]:
        """Return the names of the splits to be written."""
        return ["train", "test"] if self.test_fraction else list(self.origins)

    @property
    def remote(self) -> bool:
        return "://" in self.out_root

    def place(self, split: str) -> str:
        """Return where a split goes: a folder, a URL, or for jsonl a file."""
        name = f"{split}.jsonl" if self.task == "jsonl" else split
        return f"{self.out_root.rstrip('/')}/{name}"

    def how_packed(self) -> str:
        return self.packing or ("best_fit" if self.task in PACKED and self.tokenizer else "none")

    def check(self) -> None:
        """Raise ConfigError for arguments that do not fit each other; reads no file."""
        if not 0 <= self.test_fraction < 1:
            refuse(f"--test_fraction {self.test_fraction}: must be at least 0 and below 1")
        if self.test_fraction and list(self.origins) != ["train"]:
            refuse("--test_fraction names its splits train and test: give no other names")
        if self.seed != 17 and not self.test_fraction:
            refuse("--seed is that of --test_fraction: give that too")
        if self.stratify and not self.test_fraction:
            refuse("--stratify says how --test_fraction divides: give that too")
        if not 0 <= self.max_rejected <= 1:
            refuse(f"--max_rejected {self.max_rejected}: is a share, from 0 to 1")
        least = {"max_seq_len": 2, "processes": 1, "size_limit": 1, "max_rows": 1}
        for name, given in ((name, getattr(self, name)) for name in least):
            if given is not None and given < least[name]:
                refuse(f"--{name} {given}: must be at least {least[name]}")
        if self.size_limit >= 1 << 32:
            refuse(f"--size_limit {self.size_limit}: must be below 4 GiB, the offsets' range")
        if _repeated(self.columns):
            refuse(f"--columns: {_repeated(self.columns)} is there twice")
        for bad in (s for s in self.splits() if not re.fullmatch(r"\w[\w.-]*", s)):
            refuse(f"--splits {bad}: a split's name is a folder's: letters, digits, _ . -")
        self._check_task()
        if self.engine == "spark" and self.packing == "concat":
            refuse("--concat_tokens goes on from row to row: it is for --engine local")
        if self.engine == "spark" and self.remote:
            refuse("--engine spark: --out_root is a folder that all machines see; upload it then")
        if self.task == "jsonl" and self.remote:
            refuse("--task jsonl writes local files: give a folder as --out_root")

    def _check_task(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        for name in given:
            tasks = TASKS.get(name, tuple(OVERFLOWS))
            if self.task not in tasks:
                option = OPTIONS.get(name, f"--{name}")
                refuse(f"{option} is for --task {' or '.join(tasks)}, not {self.task}")
        if self.packing == "concat" and self.task != "text":
            refuse(f"--concat_tokens is for --task text, not {self.task}")
        if self.packing == "best_fit" and self.task not in PACKED:
            refuse(f"--packing best_fit is for --task {' or '.join(PACKED)}, not {self.task}")
        if self.packing == "concat" and self.overflow:
            refuse("--overflow has nothing to do with --concat_tokens, which cuts where it must")
        allowed = OVERFLOWS[self.task]
        if self.overflow and self.overflow not in allowed:
            takes = f"--task {self.task} takes {', '.join(allowed)}"
            refuse(f"--overflow {self.overflow}: {takes}; an answer or its end is never cut")
        if self.tokenizer is None and self.task not in ("text", "jsonl"):
            refuse("--tokenizer is missing: a folder in Hugging Face format or a hub name")
        for name in ("packing", "overflow", "max_seq_len", "bos_text", "eos_text"):
            if self.tokenizer is None and name in given:
                refuse(f"{OPTIONS.get(name, f'--{name}')} needs a --tokenizer")
        if not self.wrap and self.packing != "concat":
            refuse("--no_wrap says how --concat_tokens goes on: give that too")
        if self.labels and self.regression:
            refuse("--labels name classes, --regression has none: give one of them")
        if self.prompt_template and self.task == "classify":
            refuse("--prompt_template is not for --task classify, which reads text and text_pair")


def refuse(message: str) -> None:
    raise ConfigError(message)


def parse_origins(dataset: str | None, splits: list[str]) -> dict[str, Origin]:
    """Return what `--dataset` and `--splits` say, split by split; else raise ConfigError.

    With a dataset, `NAME`, `NAME=SPLIT` and `NAME=SPLIT[a:b]` name its splits; without one,
    `NAME=FILE[a:b]` names a source for each.
    """
    if not splits:
        return {"train": Origin(dataset)}
    origins = {}
    for item in splits:
        name, equals, value = item.partition("=")
        if not equals and dataset is None:
            refuse("--splits is written SPLIT=DATASET, as in --splits train=a.jsonl")
        parts = _SLICE.match(value or name)
        if not name or parts is None:
            refuse(f"--splits {item}: is written NAME=SPLIT or NAME=SPLIT[0:1000]")
        if dataset is not None and "[" in parts["name"]:
            refuse(f"--splits {item}: a slice is written in rows, as in NAME=SPLIT[0:1000]")
        if name in origins:
            refuse(f"--splits {item}: there are two of the name {name!r}")
        start, stop = int(parts["start"] or 0), int(parts["stop"]) if parts["stop"] else None
        if stop is not None and stop <= start:
            refuse(f"--splits {item}: the slice is empty")
        what = (dataset, parts["name"]) if dataset else (parts["name"], "train")
        origins[name] = Origin(*what, start, stop)
    return origins


def parse_fields(pairs: list[str]) -> dict[str, str]:
    """Return `--field OURS=THEIRS ...` as a dict; raise ConfigError if one is not written so."""
    if any("=" not in pair for pair in pairs):
        refuse("--field is written OURS=THEIRS, as in --field response=output")
    found = [pair.split("=", 1) for pair in pairs]
    if twice := _repeated(ours for ours, _ in found):
        refuse(f"--field {twice}=...: is there twice")
    return dict(found)


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
