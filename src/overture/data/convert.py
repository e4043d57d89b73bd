"""Records to MDS shards: read, check, divide, tokenise, pack, write, and keep the books.

A source is read twice: once to check every row and draw the splits, once to write them. All splits
are made in a hidden folder and renamed when every one of them is whole.
"""

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import overture
from overture.data import encode
from overture.data.conversations import as_threads
from overture.data.conversion import OVERFLOWS, Conversion
from overture.data.encode import InstructEncoder, Records, TextEncoder, Tokens
from overture.data.encode_chat import ChatEncoder
from overture.data.encode_pairs import ClassifyEncoder, Seq2SeqEncoder, class_names
from overture.data.examine import ALIASES, Examination, Fields, dropped, examine
from overture.data.prompts import PromptTemplate, chat_template, template, templates
from overture.data.readers import Format
from overture.data.schema import ANSWERS, EVERY_ANSWER
from overture.data.sources import Place, Source, open_source
from overture.data.splits import Part, draw, mark_repeats
from overture.data.workers import Workers
from overture.data.workspace import Workspace, refuse_drawn_twice
from overture.errors import ConfigError, nearest
from overture.tokenizer import load_tokenizer, tokenizer_sha256

BATCH_RECORDS = 400  # tokenised at once: enough for all threads, and processes end together
_SQUAD = {"context", "question", "answers"}
Say = Callable[[str], Any]


def convert(job: Conversion, say: Say = print) -> dict[str, dict[str, Any]]:
    """Convert a dataset and return the ledger of each split written.

    Raises ConfigError if the source, a field, the tokenizer or an argument does not fit, or a split
    is there already, and leaves nothing behind; GuardError if the disk is full or a worker died,
    after which `--resume` goes on from what is finished.
    """
    job.check()
    if job.engine == "spark" and not importlib.util.find_spec("pyspark"):
        fault = "--engine spark: pyspark is not installed"
        raise ConfigError(f"{fault}; pip install -r requirements-spark.txt")
    _refuse_existing(job)
    # A wrong name is to be told before anything is fetched.
    tokenizer = load_tokenizer(job.tokenizer) if job.tokenizer else None
    if job.prompt_template:
        (chat_template if job.task == "chat" else template)(job.prompt_template)
    with Workspace(job) as work:
        work.bind(job.identity())
        sources = {split: open_rows(job, split, work.folder) for split in job.origins}
        work.bind({f"source of {split}": s.fingerprint for split, s in sources.items()})
        prompt = choose_template(job, next(iter(sources.values())))
        fields = task_fields(job, prompt)
        parts = []
        for split, source in sources.items():
            found = examine(source, fields, job.max_rejected)
            say("\n".join([source.name, *(f"  {line}" for line in found.lines())]))
            check_names(job, fields, found)
            parts.append(draw(source, fields, found, split, job.test_fraction, job.seed))
        mark_repeats(parts, job.dedupe)
        ledgers = _write_all(job, work, parts, tokenizer, prompt, say)
        for split in ledgers:
            work.move_into_place(split)
        if job.remote:
            from overture.data.remote import upload_split

            for split in ledgers:
                upload_split(work.place(split), job.place(split))
    return ledgers


def describe_split(place: str, ledger: dict[str, Any]) -> str:
    """Return the figures of a ledger as one line for the terminal."""
    rows, tokens, packing = ledger["rows"], ledger["tokens"], ledger["packing"]
    line = f"{place}: {rows['in_split']:,} rows, {rows['kept']:,} kept"
    line += dropped({**rows["malformed"], **rows["dropped"]})
    line += f", {rows['truncated']:,} prompts truncated" if rows["truncated"] else ""
    line += f"; {tokens['total']:,} tokens" if tokens["total"] else ""
    if "loss_mask" in ledger["columns"]:
        line += f", {tokens['trained'] / tokens['total']:.1%} learned"
    line += f"; {ledger['samples']:,} samples"
    packed = packing["method"] != "none"
    return line + (f", {packing['utilisation']:.1%} of their room used" if packed else "")


def _refuse_existing(job: Conversion) -> None:
    """Refuse to replace a split unasked, or to put one beside another draw from its source."""
    is_there = os.path.exists
    if job.remote:
        from overture.data.remote import holds_split as is_there
    for place in map(job.place, job.splits()):
        if not (job.overwrite or job.resume) and is_there(place):
            raise ConfigError(f"{place} is there already; give --overwrite to replace it")
    if not job.remote:
        drawn = list(job.origins.values())
        refuse_drawn_twice(Path(job.out_root), job.splits(), drawn, job.data_subset)


def open_rows(job: Conversion, split: str, keep: Path) -> Source:
    """Return the rows of a split; those from the network are kept in a folder as they are read."""
    origin = job.origins[split]
    form = Format(job.columns, job.text_rows)
    source = open_source(origin.dataset, origin.split, form, job.data_subset, job.revision)
    copy = keep / f"{split}.source.jsonl"
    there = source.kept(copy) if source.streamed and copy.exists() else source
    if job.task == "chat" and as_threads(there, job.threads) is not there:
        if origin.start or origin.stop is not None:
            fault = f"{origin.dataset}: a slice would cut conversation trees"
            raise ConfigError(f"{fault}; take all of it, and --test_fraction for a test split")
        source = source.kept(copy) if source.streamed else source
        return as_threads(source, job.threads).rows(0, job.max_rows)
    source = source.rows(origin.start, origin.stop).rows(0, job.max_rows)
    if source.streamed:
        source = source.kept(copy, origin.start)
    return source if job.task == "chat" else _flat_answers(source, job)


def _flat_answers(source: Source, job: Conversion) -> Source:
    """Return SQuAD rows as the hub has them with `answer`, the first of their answers.

    For --task instruct all of them go on as a text, too.
    """

    def read() -> Iterator[tuple[Place, Any]]:
        for place, record in source.read():
            found = record.get("answers") if isinstance(record, dict) else None
            if isinstance(found, dict) and "text" in found:
                found = found["text"] if isinstance(found["text"], list) else [found["text"]]
                record = {**record, "answer": (found or [""])[0], "answers": found}
            if job.task == "instruct" and isinstance(found, list):
                texts = [a["text"] if isinstance(a, dict) and "text" in a else a for a in found]
                first = record.get("answer", (texts or [""])[0])
                if texts[:1] == [first] and all(isinstance(text, str) for text in texts):
                    record = {**record, "answer": first, EVERY_ANSWER: json.dumps(texts)}
            yield place, record

    return replace(source, read=read)


def choose_template(job: Conversion, source: Source) -> PromptTemplate | str | None:
    """Return the prompt template, or for chat the Jinja text (None: the tokenizer's own)."""
    if job.task == "chat":
        return chat_template(job.prompt_template) if job.prompt_template else None
    if job.task == "classify":
        return None
    default = {"text": "text", "seq2seq": "pair"}.get(job.task, "dolly")
    if default == "dolly" and set(source.first()) >= _SQUAD:
        default = "jsquad"
    chosen = template(job.prompt_template or default)
    if job.task != "jsonl" and (chosen.response is None) != (job.task == "text"):
        raise ConfigError(f"--prompt_template {job.prompt_template}: is not for --task {job.task}")
    return chosen


def task_fields(job: Conversion, prompt: Any) -> Fields:
    """Return the fields that a task reads; ConfigError where `--field` names another."""
    if job.task == "chat":
        kinds, learned = {"messages": "messages"}, ()
    elif job.task == "classify":
        kinds, learned = {"text": "text", "text_pair": "optional", "label": "label"}, ("label",)
        if job.fields.get("text_pair"):
            kinds["text_pair"] = "text"  # named, so it is to be there
    else:
        kinds = {name: "text" if must else "optional" for name, must in prompt.fields().items()}
        learned = (prompt.response,) if prompt.response else ()
    for name in [name for name in job.fields if name not in (*kinds, "id")]:
        fault = f"--field {name}=...: no field {name!r} is read{nearest(name, kinds)}"
        raise ConfigError(f"{fault}; there are: {', '.join(kinds)}, id")
    renamed = {ours: theirs for ours, theirs in job.fields.items() if ours in kinds}
    return Fields(kinds, learned, renamed, job.fields.get("id", "id"), job.stratify)


def check_names(job: Conversion, fields: Fields, found: Examination) -> None:
    """Raise ConfigError where an option names a field that no row has, or where one that may be
    left out seems to be there under another name.
    """
    for ours in [name for name, kind in fields.kinds.items() if kind == "optional"]:
        theirs = next((name for name in ALIASES.get(ours, ()) if name in found.names), None)
        if theirs and ours not in (*job.fields, *found.names):
            fault = f"no row has {ours!r}, but {theirs!r}"
            raise ConfigError(f"{fault}; say --field {ours}={theirs}, or --field {ours}= for none")
    named = {f"--field {ours}={theirs}": theirs for ours, theirs in job.fields.items()}
    for option, name in {**named, f"--stratify {job.stratify}": job.stratify}.items():
        if name and name not in found.names:
            hint = nearest(name, [n for n in found.names if n != EVERY_ANSWER])
            raise ConfigError(f"{option}: no row has that field{hint}")


def _write_all(
    job: Conversion, work: Workspace, parts: list[Part], tokenizer: Any, prompt: Any, say: Say
) -> dict[str, dict[str, Any]]:
    todo = [Selected(part, split) for part in parts for split in part.splits]
    if job.task == "jsonl":
        return {rows.split: _write_jsonl(job, work, rows, say) for rows in todo}
    labels = None
    if job.task == "classify":
        found = sum((part.found.labels for part in parts), Counter())
        labels = class_names(found, job.labels, job.regression)
    tokens, known = _tokens(job, tokenizer, prompt) if job.tokenizer else (None, None)
    built_in = next((name for name, one in templates().items() if one == prompt), None)
    facts = {
        "kit_version": overture.__version__, "task": job.task, "tokenizer": known,
        "prompt_template": job.prompt_template or built_in,
        "template": asdict(prompt) if isinstance(prompt, PromptTemplate) else prompt,
        "labels": labels,
    }  # fmt: skip
    work.bind({f"{name} (contents)": value for name, value in facts.items()})
    ledgers = {}
    if job.engine == "spark":
        from overture.data.spark import Cluster as Encoding
        from overture.data.spark import write_split
    else:
        Encoding = Workers
    encoder = _encoder(job, tokens, prompt, labels)
    several = any(EVERY_ANSWER in part.found.names for part in parts)
    if several and prompt.response == "answer" and "answer" not in job.fields:
        encoder.columns = {**encoder.columns, ANSWERS: "str"}
    with Encoding(encoder, job.processes) as workers:
        if job.engine == "local":  # slow to import: after the workers are forked
            from overture.data.write import write_split
        for rows in todo:
            done = work.finished(rows.split, rows.part.source, facts)
            ledgers[rows.split] = done or write_split(job, work.folder, rows, workers, facts)
            say(describe_split(job.place(rows.split), ledgers[rows.split]))
    return ledgers


def _tokens(job: Conversion, tokenizer: Any, prompt: Any) -> tuple[Tokens, dict[str, Any]]:
    tokens = template_tokens(tokenizer, prompt, specials=job.task == "chat")
    return tokens, {
        "name": job.tokenizer, "sha256": tokenizer_sha256(tokenizer),
        "vocab_size": tokens.vocab_size, "eos_token_id": tokens.eos,
    }  # fmt: skip


def template_tokens(tokenizer: Any, prompt: Any, specials: bool = False) -> Tokens:
    """Return a tokenizer for the texts of a template, in which its marks, if any, count as such."""
    text = "".join(prompt.sections) if isinstance(prompt, PromptTemplate) else ""
    has_marks = any(token in text for token in encode.special_tokens(tokenizer) if token)
    return Tokens(tokenizer, specials or has_marks)


def _encoder(job: Conversion, tokens: Tokens | None, prompt: Any, labels: Any) -> Any:
    if tokens is None:
        return encode.RawTextEncoder(prompt)
    longest = None if job.packing == "concat" else job.max_seq_len
    what = labels if job.task == "classify" else prompt
    common = (tokens, what, longest, job.overflow or OVERFLOWS[job.task][0])
    if job.task == "text":
        return TextEncoder(*common, bos_text=job.bos_text, eos_text=job.eos_text)
    kinds = {"chat": ChatEncoder, "seq2seq": Seq2SeqEncoder, "classify": ClassifyEncoder}
    return kinds.get(job.task, InstructEncoder)(*common)


class Selected:
    """The rows of one split: those kept, in batches, and those not, with the reason."""

    def __init__(self, part: Part, split: str) -> None:
        self.part, self.split = part, split
        self.mine = part.owners == part.splits.index(split)
        self.in_split = int(self.mine.sum())

    def batches(self, from_row: int = 0, whole: bool = False) -> Iterator[tuple[Any, Records]]:
        """Yield ((the row after the batch, places, rejected entries), records)."""
        found, fields = self.part.found, self.part.fields
        places, records, rejected = [], [], []
        shown = {"desc": f"converting {self.split}", "unit": " rows", "leave": False, "delay": 2}
        rows = tqdm(enumerate(self.part.source.read()), total=found.rows, disable=None, **shown)
        for row, (place, record) in rows:
            if row < from_row or not self.mine[row]:
                continue
            if found.fates[row]:
                why = found.reasons[found.fates[row]]
                rejected.append(place.rejected(why, found.details.get(row, {})))
                continue
            places.append(place)
            records.append(fields.read(record, known=True, whole=whole))
            if len(records) == BATCH_RECORDS:
                yield (row + 1, places, rejected), records
                places, records, rejected = [], [], []
        if records or rejected:
            yield (found.rows, places, rejected), records


def _write_jsonl(job: Conversion, work: Workspace, rows: Selected, say: Say) -> dict[str, Any]:
    kept, lost = 0, Counter()
    aside = work.folder / f"rejected-{rows.split}.jsonl"  # no name that reads as the split's own
    place = work.folder / f"{rows.split}.jsonl"
    how = {"encoding": "utf-8", "errors": "backslashreplace"}  # half a pair is no UTF-8
    with place.open("w", **how) as file, aside.open("w") as rejects:
        for (_, _, rejected), records in rows.batches(whole=True):
            kept += len(records)
            lost.update(entry["reason"] for entry in rejected)
            file.writelines(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records)
            rejects.writelines(json.dumps(entry) + "\n" for entry in rejected)
    (work.home / aside.name).unlink(missing_ok=True)
    if lost:
        os.replace(aside, work.home / aside.name)
    say(f"{job.place(rows.split)}: {kept:,} rows{dropped(lost)}")
    return {"rows": {"in_split": rows.in_split, "kept": kept, "dropped": dict(lost)}}
