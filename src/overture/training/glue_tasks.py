"""The eight tasks of GLUE (Wang et al. 2018, arXiv 1804.07461; no WNLI), a row for each.

Epochs, batch, learning rate and weight decay are those of MosaicBERT (Portes et al. 2023, arXiv
2312.17482), and so is that RTE, MRPC and STS-B start from the model that was tuned on MNLI, and
that the three largest tasks have one seed, the first.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from overture.config.schema import GlueConfig
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.schema import LEDGER, read_ledger, sha256_file
from overture.errors import ConfigError
from overture.tokenizer import load_tokenizer, tokenizer_sha256


class Row(NamedTuple):
    folder: str  # of its tsv files
    hub: dict[str, str]  # our fields -> the hub's
    local: dict[str, str]  # our fields -> those of the tsv files
    metrics: tuple[str, ...]
    epochs: int
    batch: int
    lr: float
    decay: float
    labels: tuple[str, ...] = ()  # of the tsv files, in the order of the hub's numbers
    columns: tuple[str, ...] = ()  # of tsv files without a header
    regression: bool = False
    from_mnli: bool = False
    one_seed: bool = False  # large enough that seeds hardly differ
    # (split that is written, tsv file, split of the hub); the first is evaluated with training
    dev: tuple[tuple[str, str, str], ...] = (("dev", "dev.tsv", "validation"),)

    @property
    def splits(self) -> tuple[tuple[str, str, str], ...]:
        return (("train", "train.tsv", "train"), *self.dev)


def _pair(one: str, other: str, **label: str) -> dict[str, str]:
    return {"text": one, "text_pair": other, **label}


_ONE, _TWO = {"text": "sentence"}, _pair("sentence1", "sentence2")
_QUESTIONS, _ENTAILED = _pair("question1", "question2"), ("entailment", "not_entailment")
_NO_YES = ("0", "1")
TASKS: dict[str, Row] = {
    "mnli": Row(
        "MNLI", _pair("premise", "hypothesis"), {**_TWO, "label": "gold_label"}, ("accuracy",),
        3, 48, 5e-5, 5e-6, labels=("entailment", "neutral", "contradiction"), one_seed=True,
        dev=(("dev", "dev_matched.tsv", "validation_matched"),
             ("dev_mm", "dev_mismatched.tsv", "validation_mismatched")),
    ),
    "cola": Row("CoLA", _ONE, _ONE, ("matthews",), 10, 32, 5e-5, 5e-6, labels=_NO_YES,
                columns=("source", "label", "star", "sentence")),
    "sst2": Row("SST-2", _ONE, _ONE, ("accuracy",), 3, 16, 3e-5, 3e-6, labels=_NO_YES),
    "mrpc": Row("MRPC", _TWO, _pair("#1 String", "#2 String", label="Quality"),
                ("accuracy", "f1"), 10, 32, 8e-5, 8e-6, labels=_NO_YES, from_mnli=True),
    "stsb": Row("STS-B", _TWO, {**_TWO, "label": "score"}, ("pearson", "spearman"),
                10, 32, 3e-5, 3e-6, regression=True, from_mnli=True),
    "qqp": Row("QQP", _QUESTIONS, {**_QUESTIONS, "label": "is_duplicate"}, ("accuracy", "f1"),
               5, 16, 3e-5, 3e-6, labels=_NO_YES, one_seed=True),
    "qnli": Row("QNLI", _pair("question", "sentence"), _pair("question", "sentence"),
                ("accuracy",), 10, 16, 1e-5, 1e-6, labels=_ENTAILED, one_seed=True),
    "rte": Row("RTE", _TWO, _TWO, ("accuracy",), 3, 16, 1e-5, 1e-5, labels=_ENTAILED,
               from_mnli=True),
}  # fmt: skip


def find_missing(config: GlueConfig) -> None:
    """Raise ConfigError if the data are a folder in which files of tasks are missing."""
    root, rows = Path(config.data), [TASKS[task] for task in config.tasks]
    if not root.is_dir() and (config.data.count("/") != 1 or config.data[0] in "/.~"):
        raise ConfigError(f"data: {config.data}: no such folder, nor a name on the hub")
    files = [f"{row.folder}/{file}" for row in rows for _, file, _ in row.splits]
    if missing := [file for file in files if root.is_dir() and not (root / file).is_file()]:
        fault = f"{config.data} has no {', '.join(missing)}"
        raise ConfigError(f"data: {fault}; put them there, or leave their tasks out of `tasks`")


def files_read(config: GlueConfig, task: str) -> list[str]:
    """Return the sha256 of each of a task's files; none of data of the hub."""
    root = Path(config.data)
    files = [root / TASKS[task].folder / file for _, file, _ in TASKS[task].splits]
    return [sha256_file(path) for path in files] if root.is_dir() else []


def convert_task(config: GlueConfig, task: str, tokenizer: str, max_seq_len: int) -> bool:
    """Convert a task's splits for a tokenizer, unless they are there; return whether they were.

    Says which rows are lost, if some are: of a dev set they are missing from the score.
    """
    row, root, out = TASKS[task], Path(config.data), Path(config.data_local) / task
    options: dict[str, Any] = {"fields": {"id": "", **row.hub}, "data_subset": task}
    origins = {split: Origin(config.data, theirs) for split, _, theirs in row.splits}
    if root.is_dir():
        options = {"fields": {"id": "", **row.local}, "columns": row.columns, "labels": row.labels}
        origins = {split: Origin(str(root / row.folder / file)) for split, file, _ in row.splits}
    options |= {"tokenizer": tokenizer, "max_seq_len": max_seq_len, "regression": row.regression}
    job = Conversion(origins, "classify", str(out), overwrite=True, **options)
    known = tokenizer_sha256(load_tokenizer(tokenizer))
    wanted = json.loads(json.dumps([job.identity(), known]))  # as a ledger gives it back
    there = [out / split for split in origins if (out / split / LEDGER).is_file()]
    ledgers = [read_ledger(folder) for folder in there]
    found = [[ledger["arguments"], ledger["tokenizer"]["sha256"]] for ledger in ledgers]
    read = [ledger["source"].get("sha256") for ledger in ledgers]
    is_of_these = not root.is_dir() or read == files_read(config, task)
    if is_of_these and found == [wanted] * len(origins):
        return True
    convert(job, lambda line: print(line, flush=True) if "dropped" in line else None)
    return False
