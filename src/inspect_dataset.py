"""Show what a converted split holds and what of it will be learned.

python src/inspect_dataset.py data/dolly --split train --sample 0 7
"""

import argparse
import sys
from pathlib import Path

from overture.errors import exit_on_error


def main() -> int:
    """Parse arguments and print counts, then samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="the out_root of the conversion")
    add("--split", default="train")
    add("--sample", nargs="*", type=int, default=[0], help="numbers of samples to show")
    add("--tokenizer", help="default: the one in the ledger")
    args = parser.parse_args()
    folder = args.folder / args.split

    from overture.data.inspect import ledger_lines, sample_lines
    from overture.data.schema import read_ledger

    print("\n".join(ledger_lines(folder)))
    if args.sample:
        from overture.data.streams import TokenStream
        from overture.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer or read_ledger(folder)["tokenizer"]["name"])
        dataset = TokenStream(local=str(args.folder), split=args.split, batch_size=1)
        for line in sample_lines(folder, dataset, tokenizer, args.sample, sys.stdout.isatty()):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
