"""Vocabularies learned from texts: byte-level BPE, BPE and unigram over characters, WordPiece.

Over characters means SentencePiece's way (Kudo & Richardson 2018, 1808.06226): a space is a
character like any other, so that a text comes back as it went in, in languages without spaces too.
What too few texts have to be worth a piece is unknown or, with byte fallback, its UTF-8 bytes. Of
SentencePiece's own habits three are left out, as each would change a text: normalising it, joining
spaces, and putting one in front.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import BertProcessing

from overture.errors import ConfigError

SPACE = "▁"
UNKNOWN = "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
HOLE = "\ufffd"  # stands, while training, for characters that are to get no piece
SENTENCE = 1 << 20  # bytes
LONGEST = 4096  # characters of a text that are learned from at once
# A piece of digits says little about their number, so each stands alone.
_DIGITS = pre_tokenizers.Digits(individual_digits=True)

Texts = Callable[[], Iterator[str]]  # from the start, each time


def byte_level(texts: Texts, size: int, specials: Sequence[str]) -> Tokenizer:
    """Return BPE over bytes: nothing is ever unknown (Radford et al. 2019, GPT-2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_DIGITS, pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(specials), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def word_piece(texts: Texts, size: int, specials: Sequence[str], lowercase: bool) -> Tokenizer:
    """Return WordPiece over words and punctuation, as BERT has it; its spaces are not kept."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    options = {"special_tokens": list(specials), "show_progress": False}
    trainer = trainers.WordPieceTrainer(vocab_size=size, **options)
    tokenizer.train_from_iterator((text.replace(HOLE, " ") for text in texts()), trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = BertProcessing(*ends)
    return tokenizer


def over_characters(
    texts: Texts, size: int, specials: Sequence[str], model: str, byte_fallback: bool
) -> Tokenizer:
    """Return BPE or unigram (Kudo 2018, 1804.10959) over characters; HOLE gets no piece."""
    added = BYTES if byte_fallback else []
    options = {
        "vocab_size": size - len(added), "special_tokens": list(specials), "show_progress": False,
        # So that what spells a byte or a special token can always be put together from letters.
        "initial_alphabet": sorted({*"".join([*specials, *added])}),
    }  # fmt: skip
    if model == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token=UNKNOWN, **options)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*_cuts(), _split(HOLE, "removed")])
    # A lattice of all ways to divide a text is kept in memory; those without spaces are long.
    short = (text[i : i + LONGEST] for text in texts() for i in range(0, len(text), LONGEST))
    tokenizer.train_from_iterator(short, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    apart = [(name, 0.0) for name in [*specials, *added]]
    if model == "bpe":
        found = sorted(learned["vocab"], key=learned["vocab"].get)[len(specials) :]
        merges = [tuple(merge) for merge in learned["merges"]]
        pieces = [*apart, *((piece, 0.0) for piece in found)]
        return _assembled(pieces, specials, byte_fallback, merges)
    # The order of the trainer's hash tables, which is another each time, is to leave no trace: it
    # gives characters that it had dropped the least score and steps of 0.0001 above it.
    found = [(piece, round(score, 6)) for piece, score in learned["vocab"][len(specials) :]]
    least = min(score for _, score in found)
    steps = least + 1e-4 * len(found)
    found = [(p, least if len(p) == 1 and score < steps else score) for p, score in found]
    found.sort(key=lambda entry: (-entry[1], entry[0]))
    return _assembled([*apart, *found], specials, byte_fallback)


def sentence_piece(
    texts: Texts, size: int, specials: Sequence[str], model: str, byte_fallback: bool
) -> tuple[Tokenizer, bytes]:
    """Return what the library sentencepiece learns, and its own model file."""
    try:
        import sentencepiece
    except ImportError:
        fault = "--library sentencepiece: the package is missing; `pip install sentencepiece`"
        raise ConfigError(f"{fault}, or leave the option out: tokenizers has both models") from None
    end, padding, unknown, *others = specials
    file, most = io.BytesIO(), SENTENCE // 4  # characters: longer texts the library drops unsaid
    parts = (part for text in texts() for part in text.split(HOLE))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(p[i : i + most] for p in parts for i in range(0, len(p), most)),
            model_writer=file, model_type=model, vocab_size=size, byte_fallback=byte_fallback,
            character_coverage=1.0, required_chars="".join(BYTES) if byte_fallback else "",
            normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, split_digits=True, max_sentence_length=SENTENCE,
            eos_id=0, eos_piece=end, pad_id=1, pad_piece=padding, unk_id=2, unk_piece=unknown,
            bos_id=-1, control_symbols=others, user_defined_symbols=["\n"], minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise ConfigError(f"--library sentencepiece: {reason}") from None
    learned = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    pieces = [(learned.id_to_piece(i), learned.get_score(i)) for i in range(len(learned))]
    merges = None
    if model == "bpe":
        from transformers.convert_slow_tokenizer import generate_merges

        numbers = {piece: number for number, (piece, _) in enumerate(pieces)}
        apart = {*specials, *BYTES}
        merges = generate_merges(numbers, {p: score for p, score in pieces if p not in apart})
    return _assembled(pieces, specials, byte_fallback, merges), file.getvalue()


def _assembled(
    pieces: list[tuple[str, float]], specials: Sequence[str], byte_fallback: bool,
    merges: list[tuple[str, str]] | None = None,
) -> Tokenizer:  # fmt: skip
    """Return a tokenizer of pieces with their scores; `merges` make it BPE, otherwise unigram."""
    if merges is None:
        # To a unigram model all its pieces are text. These must lose against the letters they are
        # spelled with, or a text that holds "<0x41>" would come back with an A in its place.
        apart = {*specials, *(BYTES if byte_fallback else [])}
        never = min(score for _, score in pieces) * (max(map(len, apart)) + 1)
        pieces = [(piece, never if piece in apart else score) for piece, score in pieces]
        model = models.Unigram(pieces, specials.index(UNKNOWN), byte_fallback)
    else:
        numbers = {piece: number for number, (piece, _) in enumerate(pieces)}
        options = {"unk_token": UNKNOWN, "fuse_unk": True, "byte_fallback": byte_fallback}
        model = models.BPE(numbers, merges, **options)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(specials))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_cuts())
    spaces = decoders.Replace(SPACE, " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _cuts() -> list[Any]:
    return [_split(r"[\r\n]+", "isolated"), pre_tokenizers.Metaspace(SPACE, "never"), _DIGITS]


def _split(pattern: str, behavior: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior)
