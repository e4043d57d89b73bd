"""What a converted split holds, as the model will meet it: counts, ids, labels, learned text."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from overture.data.collate import TokenCollator
from overture.data.encode import special_tokens
from overture.data.page import visible, write_page
from overture.data.schema import LEDGER
from overture.data.shards import Figures, Split, trusting
from overture.data.streams import TokenStream
from overture.errors import ConfigError

HIDDEN = {"kit_version", "split", "template", "arguments", "columns", "files"}  # of a ledger
MAX_RAW_TEXT = 4_000  # characters shown of a text that has no tokens
MAX_PIECES = 8  # tokens that one character may be spread over
LEARNED = ("learned", "end")
_PLAIN = {"prompt": ("", ""), "second": ("{{", "}}")} | dict.fromkeys(LEARNED, ("[[", "]]"))
_COLOURS = {"prompt": "2", "second": "2;4", "learned": "1;32", "end": "1;35"}
_COLOURED = {role: (f"\033[{code}m", "\033[0m") for role, code in _COLOURS.items()}


class Token(NamedTuple):
    """A token of a sample; a text that is not tokenised yet is one without an id."""

    id: int | None
    role: str  # prompt, second (segment), learned, or end: a special token that is learned
    text: str  # empty where it only goes on with the character of the token before


class Sample(NamedTuple):
    """One sample as the model gets it."""

    number: int  # of its row in the split
    about: str
    documents: list[list[Token]]
    padding: Sequence[Token] = ()  # one that stands for all of it


def ledger_figures(split: Split) -> dict[str, str]:
    """Return a ledger's figures for reading, by name; DataError if tokens are not counted in it."""
    told = {k: _told(v) for k, v in split.ledger.items() if v is not None and k not in HIDDEN}
    with trusting(split.folder / LEDGER):
        total, trained = (split.ledger["tokens"][name] for name in ("total", "trained"))
        return told | {"learned": f"{trained / max(total, 1):.1%} of the tokens"}


def _told(value: Any) -> str:
    if isinstance(value, dict) and "name" not in value:
        return ", ".join(f"{name} {_told(v)}" for name, v in value.items() if v).replace("_", " ")
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    if isinstance(value, int | float):
        return f"{round(value, 4):,}"
    return visible(str(value["name"] if isinstance(value, dict) else value))


def samples(
    split: Split, numbers: Sequence[int] | None, tokenizer: Any, remote: str | None = None
) -> Iterator[Sample]:
    """Yield samples of a split, or of the cache of one, made by the collator that training uses.

    `numbers` are None for some from the start, `tokenizer` is None for raw text. From a `remote`
    they are streamed, unshuffled: numbers are places in the order of arrival then. Raises
    ConfigError if there is no such sample, DataError if a row is damaged or out of reach.
    """
    if numbers is None:
        numbers = range(min(5 if remote else 1, len(split)))
    for wrong in (number for number in numbers if not 0 <= number < len(split)):
        raise ConfigError(f"--sample {wrong}: {split.folder} holds samples 0 to {len(split) - 1}")
    rows = (split.row(number) for number in numbers)
    if remote:
        place = {"local": str(split.folder.parent), "split": split.folder.name, "remote": remote}
        stream = TokenStream(**place, batch_size=1, num_canonical_nodes=1)  # in training's order
        nth = islice(enumerate(stream), max(numbers, default=-1) + 1)
        rows = (row for number, row in nth if number in numbers)
    for row in rows:
        with trusting(split.folder, f"sample {row['sample_id']} "):
            sample = _sample(split, row, tokenizer)
        yield sample


def _sample(split: Split, row: dict[str, Any], tokenizer: Any) -> Sample:
    if split.kind == "raw":
        about = f"{len(row['text']):,} characters, of which at most {MAX_RAW_TEXT:,} are shown"
        token = Token(None, "prompt", row["text"][:MAX_RAW_TEXT])
        return Sample(row["sample_id"], about, [[token]])
    ids, starts, padding = row["input_ids"].astype(np.int64), [0], []
    labels, types = np.full(len(ids), -100), np.asarray(row.get("token_type_ids", 0))
    if split.kind == "tokens":
        batch = TokenCollator(split.max_seq_len, tokenizer.pad_token_id)([row])
        labels, places = (batch[n][0, : len(ids)].numpy() for n in ("labels", "position_ids"))
        starts = np.flatnonzero(places == 0).tolist()
        if rest := split.max_seq_len - len(ids):
            padding = [Token(tokenizer.pad_token_id, "padding", f"{rest:,} × padding")]
    elif split.kind == "seq2seq":
        ids, labels = np.append(ids, row["labels"]), np.append(labels, row["labels"])
    special = [*special_tokens(tokenizer).values()]
    is_role = {"second": types > 0, "end": np.isin(labels, special), "learned": labels != -100}
    roles = np.select(list(is_role.values()), list(is_role), "prompt")
    parts = zip(*(np.split(array, starts[1:]) for array in (ids, roles)), strict=True)
    documents = [[*map(Token, i.tolist(), r, pieces(tokenizer, i.tolist()))] for i, r in parts]
    label = f", label {split.label(row)}" if "label" in row else ""
    about = f"{len(starts)} documents, {len(ids)} tokens, {(labels != -100).sum()} learned{label}"
    return Sample(row["sample_id"], about, documents, padding)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each id, so that they make up the whole text.

    Of the tokens that a rare character is spread over, the first has it, the others nothing.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    before, found = decode(anchor), []
    while len(found) < len(ids):
        rest = ids[len(found) : len(found) + MAX_PIECES]
        for count in range(1, len(rest) + 1):
            # Behind another token, a piece keeps its leading space.
            text = decode([*anchor, *rest[:count]]).removeprefix(before)
            if text and "\ufffd" not in text:
                found += [text, *[""] * (count - 1)]
                break
        else:
            found.append(f"⟨{tokenizer.convert_ids_to_tokens(rest[0])}⟩")
    return found


def sample_lines(sample: Sample, colour: bool) -> Iterator[str]:
    """Yield lines on a sample, a block per document, in colours or with [[learned]] {{second}}."""
    yield f"sample {sample.number}: {visible(sample.about)}"
    marks = _COLOURED if colour else _PLAIN
    for index, tokens in enumerate(sample.documents):
        ids = [token.id for token in tokens if token.id is not None]
        labels = [token.id if token.role in LEARNED else -100 for token in tokens]
        if ids:
            yield f" document {index}: {len(ids)} tokens, {labels.count(-100)} masked (-100)"
            yield f"  ids     {' '.join(map(str, ids))}"
            yield f"  labels  {' '.join(map(str, labels))}"
        text = ""
        for (before, after), run in groupby(tokens, lambda token: marks[token.role]):
            text += before + visible("".join(token.text for token in run)) + after
        yield from ("  " + line for line in text.splitlines())


def write_split_page(
    file: Path, split: Split, figures: Figures, tokenizer: Any, numbers: Sequence[int] | None
) -> None:
    """Write the page of a split to `file`, all at once; it says if `figures` are not of all rows.

    Samples of these `numbers` come before the longest, the shortest and the most masked. Raises as
    `samples` does, and ConfigError if the file cannot be written.
    """
    lengths, learned = np.array(figures.lengths), np.array(figures.learned)
    extremes = {"Longest": lengths.argmax(), "Shortest": lengths.argmin()}
    extremes |= {"Most masked": (learned / lengths).argmin()} if learned.any() else {}
    chosen = {f"{name}: ": [figures.numbers[place]] for name, place in extremes.items()}
    every = {"": numbers, **chosen}.items()
    drawn = [(name, sample) for name, some in every for sample in samples(split, some, tokenizer)]
    values = {"figures": figures.summary(), "ledger": list(ledger_figures(split).items())}
    title = f"{split.ledger['task']}: {split.folder}"
    try:
        write_page(file, Path(__file__), title, **values, drawn=drawn)
    except OSError as error:
        raise ConfigError(f"--html {file}: cannot be written ({error.strerror})") from None
