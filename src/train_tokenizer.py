"""Train a tokenizer and save it in Hugging Face format, with figures on text that is held out.

python src/train_tokenizer.py --input data/my.jsonl --vocab_size 32000 --out data/tokenizer
python src/train_tokenizer.py --input data/ja.txt --model unigram --vocab_size 32000 \
  --character_coverage 0.9995 --byte_fallback --out data/tokenizer-ja
"""

import argparse
import sys
from pathlib import Path

from overture.data.prompts import chat_templates, templates
from overture.errors import exit_on_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    files = "text files, or datasets as convert_dataset.py takes them; all their texts, whole"
    add("--input", dest="inputs", nargs="+", required=True, help=files)
    add("--vocab_size", type=int, required=True, help="with special tokens and bytes")
    add("--out", type=Path, required=True)
    kinds = "bpe is over bytes, or with byte_fallback, a coverage or sentencepiece over characters"
    add("--model", choices=("bpe", "unigram", "wordpiece"), default="bpe", help=kinds)
    add("--library", choices=("tokenizers", "sentencepiece"), default="tokenizers")
    fallback = "what has no piece becomes its bytes, so that nothing is unknown"
    add("--byte_fallback", action="store_true", help=fallback)
    coverage = "share of the text whose characters have pieces; 0.9995 for Japanese"
    add("--character_coverage", type=float, default=1.0, help=coverage)
    add("--lowercase", action="store_true", help="wordpiece: take case and accents away")
    add("--special_tokens", nargs="+", default=[], help="beside the usual ones")
    chats = f"{', '.join(chat_templates())}, or a Jinja file; its <|markers|> become special tokens"
    add("--chat_template", help=chats)
    add("--prompt_template", choices=list(templates()), help="of the data to come")
    add("--data_subset", help="of a dataset on the hub that has some, as en of allenai/c4")
    add("--eval_input", nargs="+", default=[], help="texts for the figures")
    share = "share of the texts that is held out for them (0.01), where there is no --eval_input"
    add("--eval_fraction", type=float, help=share)
    add("--overwrite", action="store_true")
    args = parser.parse_args()

    from overture.tokenizer_training import Plan, train_tokenizer

    size, figures = train_tokenizer(Plan(**vars(args)))
    print("\n".join([f"{args.out}: {size:,} pieces", *figures.lines()]))


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
