"""Tokenizers trained on real texts, and what they make of the hundredth of them that is held out.

    OVERTURE_DATA=FOLDER python benchmarks/tokenizer_fertility.py

Botchan in English at 2,000 pieces, 50,000 Japanese sentences divided into words at 3,000, and
paragraphs of the Japanese Wikipedia (those of JaQuAD) at 8,000, by every model of
src/train_tokenizer.py and by sentencepiece. Writes benchmarks/results/tokenizer_fertility.json.
"""

import gzip
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

TEXTS = {
    "botchan": ("text/botchan.txt", 2000), "enja": ("small_parallel_enja/train.ja", 3000),
    "jaquad": ("jaquad/jaquad_train.json.gz", 8000),
}  # fmt: skip
JAPANESE = ("enja", "jaquad")  # of many characters, the rarest of which become bytes
KINDS = (
    ("bpe", False, "tokenizers"), ("bpe", True, "tokenizers"), ("unigram", True, "tokenizers"),
    ("wordpiece", False, "tokenizers"), ("bpe", True, "sentencepiece"),
    ("unigram", True, "sentencepiece"),
)  # fmt: skip


def main() -> None:
    """Train, print a table, write the results."""
    from overture.tokenizer_training import Plan, train_tokenizer

    data, rows = Path(os.environ["OVERTURE_DATA"]), []
    head = ("text", "pieces", "model", "library", "tokens a word", "tokens a byte", "unknown",
            "changed", "seconds")  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    with tempfile.TemporaryDirectory() as folder:
        for name, (place, size) in TEXTS.items():
            path = data / place
            if name == "jaquad":
                with gzip.open(path) as file:
                    parts = [p for a in json.load(file)["data"] for p in a["paragraphs"]]
                path = Path(folder) / "jaquad.txt"
                path.write_text("".join(f"{part['context']}\n" for part in parts[:4000]))
            for model, fallback, library in KINDS:
                begin = time.perf_counter()
                plan = Plan(
                    [str(path)], size, Path(folder) / "made", model, library,
                    byte_fallback=fallback, overwrite=True,
                    character_coverage=0.9995 if fallback and name in JAPANESE else 1.0,
                )  # fmt: skip
                _, found = train_tokenizer(plan)
                seconds = time.perf_counter() - begin
                shown = f"{model}{', bytes' * fallback}"
                figures = {
                    "text": name, "pieces": size, "model": shown, "library": library,
                    "tokens_per_word": round(found.tokens / found.words, 3),
                    "tokens_per_byte": round(found.tokens / found.bytes, 4),
                    "unknown": round(found.unknown / found.tokens, 5),
                    "changed": f"{found.changed} of {found.texts}", "seconds": round(seconds, 1),
                }  # fmt: skip
                rows.append(figures)
                print("| " + " | ".join(map(str, figures.values())) + " |", flush=True)
    versions = {}
    for package in ("tokenizers", "transformers", "sentencepiece"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    about = {"python": platform.python_version(), "platform": platform.platform(), **versions}
    results = {"program": "tokenizer_fertility", "environment": about, "rows": rows}
    out = ROOT / "benchmarks" / "results" / "tokenizer_fertility.json"
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
