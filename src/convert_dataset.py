"""Convert a dataset into MDS shards with a ledger, one folder per split.

    python src/convert_dataset.py --dataset databricks/databricks-dolly-15k --task instruct \
        --tokenizer meta-llama/Llama-3.2-1B --out_root data/dolly --test_fraction 0.1
"""

import argparse
import sys
from pathlib import Path

from overture.config.load import adopt_hub_token
from overture.data.prompts import TEMPLATES
from overture.errors import ConfigError, exit_on_error


def main() -> int:
    """Parse arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="FILE.jsonl, a hub name, or `embedded`")
    source.add_argument("--splits", nargs="+", metavar="SPLIT=DATASET", help="one source a split")
    add("--task", required=True, choices=["instruct", "text", "jsonl"])
    add("--out_root", required=True, type=Path)
    add("--tokenizer", help="a folder or hub name (not needed for jsonl)")
    add(
        "--prompt_template", choices=list(TEMPLATES), help="default: dolly, or text for --task text"
    )
    add("--field", nargs="+", default=[], metavar="OURS=THEIRS", help="response=output ...")
    add("--source_split", default="train", help="split of a hub dataset")
    add("--split", help="name of the split written (default: train)")
    add("--test_fraction", type=float, default=0.0, help="share held out as split `test`")
    add("--seed", type=int, default=17, help="of the split")
    add("--max_rows", type=int)
    add("--max_seq_len", type=int, default=2048)
    add("--overflow", choices=["truncate_prompt", "drop"], default="truncate_prompt")
    add("--packing", choices=["best_fit", "none"], default="best_fit")
    add("--compression", choices=["zstd"])
    add("--size_limit", type=int, default=1 << 26, help="bytes per shard")
    add("--overwrite", action="store_true")
    args = parser.parse_args()
    if not 0 <= args.test_fraction < 1:
        raise ConfigError(f"--test_fraction {args.test_fraction}: must be at least 0 and below 1")
    if args.max_seq_len < 2:
        raise ConfigError(f"--max_seq_len {args.max_seq_len}: must be at least 2")
    if any("=" not in pair for pair in args.field):
        raise ConfigError("--field is written OURS=THEIRS, as in --field response=output")
    if any("=" not in pair for pair in args.splits or []):
        raise ConfigError("--splits is written SPLIT=DATASET, as in --splits train=a.jsonl")
    if args.test_fraction and (args.splits or args.split):
        raise ConfigError("--test_fraction names its splits train and test: give no other names")
    options = vars(args)
    options["fields"] = dict(pair.split("=", 1) for pair in options.pop("field"))
    dataset, split, splits = (options.pop(name) for name in ("dataset", "split", "splits"))
    options["datasets"] = (
        dict(pair.split("=", 1) for pair in splits) if splits else {split or "train": dataset}
    )
    options["prompt_template"] = args.prompt_template or (
        "text" if args.task == "text" else "dolly"
    )
    if (args.task == "text") != (TEMPLATES[options["prompt_template"]].response is None):
        raise ConfigError(
            f"--prompt_template {options['prompt_template']} is not for --task {args.task}"
        )
    adopt_hub_token()

    from overture.data.convert import Conversion, convert

    convert(Conversion(**options))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
