"""Show what a converted split holds and what of it will be learned.

python src/inspect_dataset.py data/dolly --sample 0 7
python src/inspect_dataset.py data/dolly --split train --html dolly.html
python src/inspect_dataset.py --data_remote s3://bucket/dolly --data_local cache --split test
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from overture.errors import ConfigError, exit_on_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, nargs="?", help="the out_root of the conversion")
    add("--split", default="train")
    add("--sample", nargs="*", type=int, help="numbers of samples to show; streamed: the n-th")
    add("--tokenizer", help="default: the one in the ledger")
    add("--data_remote", help="stream from there, a folder or s3://..., as training does")
    add("--data_local", type=Path, help="where streamed data is cached")
    add("--html", type=Path, metavar="FILE", help="write a page that draws every token")
    add("--stats", action="store_true", help="print figures of all rows as json")
    add("--verify", action="store_true", help="recompute all hashes and counts; exit 4 if wrong")
    args = parser.parse_args()
    if [args.folder is None] * 2 != [args.data_remote is not None, args.data_local is not None]:
        raise ConfigError("give a FOLDER, or instead both --data_remote and --data_local")
    if (args.verify or args.stats) and not args.html and (args.sample or args.tokenizer):
        raise ConfigError("--sample and --tokenizer draw samples: leave out --verify and --stats")
    if not args.folder and (args.html or args.stats or args.verify):
        raise ConfigError("--html, --stats and --verify read a FOLDER: copy the split to one")

    from overture.data.cache import open_cache
    from overture.data.inspect import ledger_figures, sample_lines, samples, write_split_page
    from overture.data.shards import Figures, Split
    from overture.data.verify import verify

    aside = partial(print, file=sys.stderr)
    if args.data_remote:
        open_cache(args.data_remote, str(args.data_local), args.split, say=aside)
    split = Split((args.folder or args.data_local) / args.split)
    if args.verify:
        figures = verify(split, aside if args.stats else print)
    elif args.stats or args.html:
        figures = Figures(split, len(split) if args.stats else 4_000)
    if args.stats:
        print(json.dumps(figures.summary(), indent=1, ensure_ascii=False))
    if args.html:
        write_split_page(args.html, split, figures, _tokenizer(args.tokenizer, split), args.sample)
        aside(f"{args.html}: written")
    if not (args.html or args.stats or args.verify):
        print(*(f"{name:<17}{text}" for name, text in ledger_figures(split).items()), sep="\n")
        tokenizer = _tokenizer(args.tokenizer, split)
        for sample in samples(split, args.sample, tokenizer, args.data_remote):
            print(*sample_lines(sample, sys.stdout.isatty()), sep="\n")


def _tokenizer(name: str | None, split: Any) -> Any:
    from overture.tokenizer import load_tokenizer, tokenizer_sha256

    if split.tokenizer is None and name is None:
        return None
    tokenizer = load_tokenizer(name or split.tokenizer)
    known = split.ledger["tokenizer"] or {"sha256": "none"}
    if known.get("sha256") not in (None, tokenizer_sha256(tokenizer)):
        name = name or split.tokenizer
        raise ConfigError(f"--tokenizer {name}: not the one that {split.folder} was converted with")
    return tokenizer


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
