"""Train a byte-level BPE tokenizer and save it in Hugging Face format.

python src/train_tokenizer.py --input data/my.jsonl --vocab_size 32000 --out data/tokenizer
"""

import argparse
import sys
from pathlib import Path

from overture.data.prompts import templates
from overture.errors import exit_on_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files = ".txt or .jsonl files, hub names"
    parser.add_argument("--input", dest="inputs", nargs="+", required=True, help=files)
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt_template", choices=list(templates()), help="of the data to come")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()

    from overture.tokenizer import train_tokenizer

    size = train_tokenizer(**vars(args))
    print(f"{args.out}: {size:,} pieces")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
