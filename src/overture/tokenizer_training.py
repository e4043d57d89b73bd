"""Training a tokenizer: what is asked for, the texts, a folder in Hugging Face format, figures."""

import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from overture import vocabulary
from overture.data.conversion import refuse
from overture.data.encode import Tokens
from overture.data.encode_chat import ChatEncoder
from overture.data.prompts import PromptTemplate, chat_template, template
from overture.data.readers import READERS, Malformed, open_bytes, reader
from overture.data.schema import folder_aside
from overture.data.sources import local_files, open_source
from overture.errors import ConfigError
from overture.vocabulary import BYTES, UNKNOWN

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MASK = "<|mask|>"
MAX_HELD_OUT = 10_000  # texts

# What each special token is for, by the names of transformers.
_ENDS = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PADDING}
_OF_BERT = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A tokenizer to be trained: the arguments of `src/train_tokenizer.py`."""

    inputs: list[str]
    vocab_size: int  # with special tokens and bytes
    out: Path
    model: str = "bpe"  # bpe | unigram | wordpiece
    library: str = "tokenizers"  # tokenizers | sentencepiece
    byte_fallback: bool = False  # for bpe and unigram: the bytes of a character without a piece
    character_coverage: float = 1.0  # share of the text whose characters get a piece each
    lowercase: bool = False  # wordpiece: case and accents away
    special_tokens: list[str] = field(default_factory=list)
    chat_template: str | None = None  # a built-in one, or a Jinja file
    prompt_template: str | None = None
    data_subset: str | None = None  # of a dataset on the hub
    eval_input: list[str] = field(default_factory=list)
    eval_fraction: float | None = None  # of the texts, held out; default 0.01, if no eval_input
    overwrite: bool = False

    @property
    def is_byte_level(self) -> bool:
        plain = not self.byte_fallback and self.character_coverage == 1
        return self.model == "bpe" and self.library == "tokenizers" and plain

    def roles(self) -> dict[str, str]:
        """Return the special tokens by their names in transformers."""
        if self.model == "wordpiece":
            return _OF_BERT
        unknown = {} if self.is_byte_level else {"unk_token": UNKNOWN}
        return {**_ENDS, **unknown, "mask_token": MASK}

    def specials(self) -> list[str]:
        """Return all special tokens, in the order of their ids."""
        written = re.findall(r"<\|\w+\|>", self.chat() or "")
        return list(dict.fromkeys([*self.roles().values(), *written, *self.special_tokens]))

    def chat(self) -> str | None:
        """Return the text of the chat template."""
        return self.chat_template and chat_template(self.chat_template, "--chat_template")

    def check(self) -> None:
        """Raise ConfigError for arguments that do not fit each other, or a folder in use."""
        if self.model == "wordpiece":
            for option in ("byte_fallback", "library"):
                if getattr(self, option) != getattr(Plan, option):
                    refuse(f"--{option} is for --model bpe or unigram, not wordpiece")
        elif self.lowercase:
            refuse("--lowercase is for --model wordpiece: the others give every text back")
        if not 0 < self.character_coverage <= 1:
            refuse(f"--character_coverage {self.character_coverage}: must be above 0, at most 1")
        if self.eval_input and self.eval_fraction is not None:
            refuse("--eval_fraction is of --input: leave it or --eval_input out")
        if not 0 <= (self.eval_fraction or 0) <= 0.5:
            refuse(f"--eval_fraction {self.eval_fraction}: must be from 0 to 0.5")
        for token in self.special_tokens:
            if token != token.strip() or not token:
                refuse(f"--special_tokens {token!r}: is empty, or begins or ends with a space")
        count, has_bytes = len(self.specials()), self.is_byte_level or self.byte_fallback
        if self.vocab_size < count + 256 * has_bytes:
            needed = f"{'256 bytes and ' * has_bytes}{count} special tokens"
            refuse(f"--vocab_size {self.vocab_size}: {needed} need {count + 256 * has_bytes}")
        if self.out.exists() and not self.overwrite:
            refuse(f"{self.out} is there already; give --overwrite to replace it")
        ours = [self.out / name for name in ("tokenizer_config.json", "tokenizer.json")]
        if self.out.exists() and not all(path.is_file() for path in ours):
            refuse(f"{self.out}: holds no tokenizer, so it is not replaced; name another folder")


class Figures(NamedTuple):
    """What a tokenizer makes of texts that it was not trained on."""

    texts: int
    words: int  # between spaces
    bytes: int  # in UTF-8
    tokens: int
    unknown: int  # of the tokens
    changed: int  # texts that do not come back as they went in

    def lines(self) -> list[str]:
        """Return the figures as sentences."""
        if not self.tokens:
            return ["held out: nothing, so there are no figures; give --eval_input"]
        return [
            f"held out: {self.texts:,} texts, {self.words:,} words, {self.bytes:,} bytes",
            f"fertility: {self.tokens / max(self.words, 1):.3f} tokens a word, "
            f"{self.tokens / self.bytes:.4f} tokens a byte",
            f"unknown: {self.unknown / self.tokens:.4%} of the tokens; "
            f"round trip: {self.changed:,} of {self.texts:,} texts come back changed",
        ]


def train_tokenizer(plan: Plan) -> tuple[int, Figures]:
    """Train a tokenizer, write it to `plan.out`, return its size and its figures on other texts.

    Every text in a record counts, of a message what is said, or, with a prompt template, what the
    model will see of it, so that the template's own words become single pieces too. Raises
    ConfigError: what `check` finds, a bad input, or a text that does not give this size.
    """
    plan.check()
    specials, size, file = plan.specials(), plan.vocab_size, None
    corpus, held_out = _Corpus(plan.inputs, plan), _Corpus(plan.eval_input, plan)
    if not plan.is_byte_level:
        corpus.holes = dict.fromkeys(map(ord, _needed(plan, corpus)), vocabulary.HOLE)
    how = (corpus.texts, size, specials, plan.model, plan.byte_fallback)
    if plan.is_byte_level:
        made = vocabulary.byte_level(corpus.texts, size, specials)
    elif plan.model == "wordpiece":
        made = vocabulary.word_piece(corpus.texts, size, specials, plan.lowercase)
    elif plan.library == "sentencepiece":
        made, file = vocabulary.sentence_piece(*how)
    else:
        made = vocabulary.over_characters(*how)
    found = made.get_vocab_size()
    if found > size:
        fault = f"--vocab_size {size}: characters and special tokens alone take {found}"
        raise ConfigError(f"{fault}; raise it, or lower --character_coverage")
    if found < size:
        fault = f"--vocab_size {size}: the text gives only {found} pieces"
        raise ConfigError(f"{fault}; lower it, or give more text")
    unseen = [*chain.from_iterable(held_out.records())] or corpus.held_out
    figures = measure(made, unseen, plan)
    _save(made, plan, file)
    return found, figures


class _Corpus:
    """The texts of some inputs, as often as they are asked for; some of them held out."""

    def __init__(self, names: Sequence[str], plan: Plan) -> None:
        chosen = template(plan.prompt_template) if plan.prompt_template else None
        # Opened here: a missing file is an error.
        self._sources = [_texts(name, chosen, plan) for name in names]
        default = 0.0 if plan.eval_input else 0.01
        self._share = default if plan.eval_fraction is None else plan.eval_fraction
        # What spells a special token or a byte is not to become a piece of that name.
        names = [re.escape(token) for token in plan.specials()] + ["<0x[0-9A-F]{2}>"]
        self._names = re.compile("|".join(names))
        self.holes: dict[int, str] = {}  # marks in place of characters that get no piece
        self.held_out: list[str] = []

    def records(self) -> Iterator[list[str]]:
        return (record for source in self._sources for record in source())

    def texts(self) -> Iterator[str]:
        self.held_out, share = [], self._share
        for number, record in enumerate(self.records()):  # of which all is held out, or nothing
            due = int((number + 1) * share) > int(number * share)
            if due and len(self.held_out) < MAX_HELD_OUT:
                self.held_out += record
                continue
            for text in record:
                text = self._names.sub("\n", text)
                yield text.translate(self.holes) if self.holes else text


def _texts(
    name: str, chosen: PromptTemplate | None, plan: Plan
) -> Callable[[], Iterator[list[str]]]:
    """Return what yields the texts of each record of a file or dataset, from its start."""
    files = [Path(name)] if Path(name).is_file() else local_files(name, "train")
    if files and {reader(path) for path in files} <= {None, READERS[".txt"]}:
        for option in ("prompt_template", "data_subset"):
            if getattr(plan, option):
                refuse(f"--{option} {getattr(plan, option)}: {name} is text, without fields")
        return lambda: ([line] for line in chain.from_iterable(map(_lines, files)))
    source = open_source(name, subset=plan.data_subset)

    def read() -> Iterator[list[str]]:
        for place, record in source.read():
            if isinstance(record, Malformed):
                raise ConfigError(f"{name}: {place} {record.detail}")
            if chosen is None:
                yield [*_strings(record)]
                continue
            texts = {key: text for key, text in record.items() if text and isinstance(text, str)}
            if not record.keys() & chosen.fields().keys():
                fields = f"none of its fields ({', '.join(chosen.fields())})"
                refuse(f"--prompt_template {plan.prompt_template}: {name}: {place} has {fields}")
            made = (chosen.prompt(texts), texts.get(chosen.response, ""))
            yield [text for text in made if text]

    return read


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts in a record, of a message what is said alone."""
    if isinstance(value, dict):
        said = [value[name] for name in ("content", "value") if name in value]
        value = said if said and {"role", "from"} & value.keys() else [*value.values()]
    if isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif value and isinstance(value, str):
        yield value


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, their ends included."""
    try:
        with open_bytes(path) as file:
            yield from io.TextIOWrapper(file, "utf-8-sig", newline="")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read as text in UTF-8 ({error})") from None


def _needed(plan: Plan, corpus: _Corpus) -> list[str]:
    """Return the characters that coverage leaves out; ConfigError if the others do not fit."""
    counts: Counter[str] = Counter()
    for text in corpus.texts():
        counts.update(text)
    if not counts:
        raise ConfigError(f"{', '.join(plan.inputs)}: there is no text in it")
    room, rare = (1 - plan.character_coverage) * counts.total(), []
    for character in sorted(counts, key=lambda c: (counts[c], c)):
        room -= counts[character]
        if room < 0:
            break
        rare.append(character)
    apart = [*plan.specials(), *(BYTES if plan.byte_fallback else [])]
    kept = len({*counts, *"".join(apart)} - {*rare})
    # WordPiece folds case and drops what does not print: it is asked afterwards.
    if plan.model != "wordpiece" and kept + len(apart) >= plan.vocab_size:
        others = f"{len(apart)} special tokens{' and bytes' if plan.byte_fallback else ''}"
        fault = f"--vocab_size {plan.vocab_size}: {kept} characters and {others} leave no"
        raise ConfigError(f"{fault} room for pieces; raise it, or lower --character_coverage")
    return rare


def _save(made: Any, plan: Plan, file: bytes | None) -> None:
    from transformers import PreTrainedTokenizerFast

    more = [token for token in plan.specials() if token not in plan.roles().values()]
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False,
        additional_special_tokens=more, **plan.roles(),
    )  # fmt: skip
    if plan.chat_template:
        whole.chat_template = plan.chat()
        ChatEncoder(Tokens(whole, specials=True), None, None, "truncate_prompt")  # or ConfigError
        whole.backend_tokenizer.encode_special_tokens = False
    with folder_aside(plan.out) as aside:
        whole.save_pretrained(aside)
        if file is not None:
            (aside / "tokenizer.model").write_bytes(file)


def measure(made: Any, texts: list[str], plan: Plan) -> Figures:
    """Return the figures of a tokenizer of `tokenizers` on some texts, special tokens as text.

    WordPiece keeps no spaces: there a text has changed if anything else of it has.
    """
    unknown = made.token_to_id(plan.roles().get("unk_token", ""))
    made.encode_special_tokens, tokens, unknowns, changed = True, 0, 0, 0
    for text, found in zip(texts, made.encode_batch(texts, add_special_tokens=False), strict=True):
        tokens += len(found.ids)
        unknowns += found.ids.count(unknown)
        back = made.decode(found.ids, skip_special_tokens=False)
        if made.normalizer:
            text, back = ("".join(made.normalizer.normalize_str(x).split()) for x in (text, back))
        changed += back != text
    made.encode_special_tokens = False
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    return Figures(len(texts), words, size, tokens, unknowns, changed)
