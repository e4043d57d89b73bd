"""Tiny files in the layout of GLUE: eight tasks whose labels follow from a few words.

python tests/glue_files.py FOLDER
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

NOUNS = ("cat", "dog", "bird", "horse", "fish", "child", "farmer", "doctor", "king", "tree")
VERBS = ("sees", "likes", "finds", "follows", "helps", "calls")
GOOD, BAD = ("good", "happy", "bright", "fine", "warm"), ("bad", "sad", "dull", "poor", "cold")
ROWS = {"train": 320, "dev": 64, "dev_matched": 64, "dev_mismatched": 64}
HEADERS = {
    "SST-2": "sentence\tlabel",
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tsentence1\tsentence2\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tgenre\tsentence1\tsentence2\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
}


def _words(rng: random.Random) -> list[str]:
    one, other = rng.sample(NOUNS, 2)
    kinds = [rng.choice(GOOD + BAD) for _ in range(2)]
    return ["the", kinds[0], one, rng.choice(VERBS), "the", kinds[1], other]


def _lines(folder: str, count: int, rng: random.Random) -> Iterator[str]:
    for number in range(count):
        words, others, which = _words(rng), _words(rng), number % 2
        one, other = " ".join(words), " ".join(others)
        if folder == "CoLA":  # in order, or not
            shuffled = rng.sample(words, len(words))
            yield f"gj04\t{which}\t{'' if which else '*'}\t{one if which else ' '.join(shuffled)}"
        elif folder == "SST-2":  # by its adjectives
            words[1], words[5] = (rng.choice(GOOD if which else BAD) for _ in range(2))
            yield f'{" ".join(words)} "\t{which}'  # quotes are characters like any other
        elif folder == "MRPC":
            yield f"{which}\t{number}\t{number}\t{one}\t{one + ' now' if which else other}"
        elif folder == "STS-B":  # the share of words that stay
            same = number % 6
            mixed = " ".join(words[:same] + others[same:])
            yield f"{number}\tnews\t{one}\t{mixed}\t{same:.3f}"
        elif folder == "QQP":
            thing = words[6] if which else others[6]
            asked = f"where is the {words[6]} ?\twhere can one find the {thing} ?"
            yield f"{number}\t{number}\t{number}\t{asked}\t{int(words[6] == thing)}"
        elif folder == "MNLI":
            label = ("entailment", "neutral", "contradiction")[number % 3]
            told = {"entailment": " ".join(words[:4]), "neutral": other}
            yield f"{number}\tnews\t{one}\t{told.get(label, f'it is false that {one}')}\t{label}"
        else:
            label = "entailment" if which else "not_entailment"
            asked = f"what does the {words[2]} do ?" if folder == "QNLI" else one
            told = one if folder == "QNLI" else " ".join(words[:4])
            yield f"{number}\t{asked}\t{told if which else other}\t{label}"


def write_glue(root: Path) -> Path:
    """Write the files of all eight tasks into `root`, the same each time, and return it."""
    for folder in ("CoLA", *HEADERS):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for split, count in ROWS.items():
            if (split.startswith("dev_")) != (folder == "MNLI") and split != "train":
                continue
            lines = _lines(folder, count, random.Random(f"{folder} {split}"))
            header = [HEADERS[folder]] if folder in HEADERS else []
            path = root / folder / f"{split}.tsv"
            path.write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")
    return root


if __name__ == "__main__":
    print(f"wrote {write_glue(Path(sys.argv[1]))}")
