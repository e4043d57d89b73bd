"""Convert a dataset into MDS shards with a ledger, one folder per split.

    python src/convert_dataset.py --dataset databricks/databricks-dolly-15k --task instruct \
        --tokenizer meta-llama/Llama-3.2-1B --out_root data/dolly --test_fraction 0.1

A dataset is a file (jsonl, json, csv, tsv, parquet, txt; also .gz, .zst), a folder, a quoted
pattern, two line-aligned files as FILE,FILE, SQuAD-format json, a hub name, or `embedded`.
"""

import argparse
import os
import sys

from overture.config.load import adopt_hub_token
from overture.data.conversion import OVERFLOWS, Conversion, parse_fields, parse_origins
from overture.errors import ConfigError, exit_on_error


def main() -> int:
    """Parse arguments and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", help="what to convert")
    add(
        "--splits",
        nargs="+",
        default=[],
        metavar="NAME=SPLIT[a:b]",
        help="splits to write: of --dataset, or without it NAME=DATASET[a:b]; default: train",
    )
    add("--task", choices=list(OVERFLOWS))
    add("--out_root", help="a folder, or s3://bucket/path, gs://...")
    add("--tokenizer", help="a folder or hub name; --task text without one keeps raw text")
    add("--data_subset", help="of a hub dataset")
    add("--revision", help="of a hub dataset: a commit, tag or branch")
    add("--field", nargs="+", default=[], metavar="OURS=THEIRS", help="response=output ...")
    add("--columns", nargs="+", default=(), help="of csv or tsv files that have no header")
    add(
        "--text_rows",
        choices=["file", "line", "block"],
        default="file",
        help="what is a document of a .txt file (block: between blank lines)",
    )
    add("--threads", choices=["all", "best"], default="all", help="of conversation trees")
    add("--max_rows", type=int)
    add("--max_rejected", type=float, default=0.01, help="share of malformed rows put up with")
    add("--prompt_template", help="a built-in one or a file (--task chat: a chat template)")
    add("--list_templates", action="store_true", help="show the built-in templates and exit")
    add("--test_fraction", type=float, default=0.0, help="share held out as split `test`")
    add("--stratify", metavar="FIELD", help="hold out the same share of each of its values")
    add("--seed", type=int, default=17, help="of the division")
    add("--dedupe", action="store_true", help="drop rows that repeat an earlier one")
    add("--max_seq_len", type=int, help="tokens; default: 2048")
    add(
        "--overflow",
        choices=["truncate_prompt", "drop", "split", "error"],
        help="rows of more than max_seq_len tokens; default: split for text, else truncate_prompt",
    )
    add("--packing", choices=["best_fit", "none"], help="default: best_fit, where a task can")
    add("--concat_tokens", type=int, metavar="N", help="text end to end, cut into rows of N tokens")
    add("--no_wrap", action="store_true", help="with it: begin every row with a document")
    add("--bos_text", help="before each text, instead of the tokenizer's BOS ('' for none)")
    add("--eos_text", help="after each text, instead of the tokenizer's EOS ('' for none)")
    add("--labels", nargs="+", default=(), help="names of the classes, in the order of their ids")
    add("--regression", action="store_true", help="labels are numbers")
    add("--compression", choices=["zstd"])
    add("--size_limit", type=int, default=1 << 26, help="bytes per shard")
    add("--processes", type=int, default=1, help="that tokenise; 1 uses the tokenizer's threads")
    add("--overwrite", action="store_true", help="replace splits that are there")
    add("--resume", action="store_true", help="go on with what was interrupted")
    options = vars(parser.parse_args())
    if options.pop("list_templates"):
        from overture.data.prompts import list_templates

        print("\n".join(list_templates()))
        return 0
    for name in ("task", "out_root"):
        if options[name] is None:
            raise ConfigError(f"--{name} is missing (see --help)")
    dataset, splits, concat = (options.pop(n) for n in ("dataset", "splits", "concat_tokens"))
    if dataset is None and not splits:
        raise ConfigError("--dataset is missing: a file, a folder, a hub name or `embedded`")
    if concat is not None:
        if options["packing"] or options["max_seq_len"]:
            raise ConfigError("--concat_tokens excludes --packing and --max_seq_len")
        options.update(packing="concat", max_seq_len=concat)
    options["max_seq_len"] = options["max_seq_len"] or Conversion.max_seq_len
    options["wrap"] = not options.pop("no_wrap")
    options["fields"] = parse_fields(options.pop("field"))
    options |= {name: tuple(options[name]) for name in ("columns", "labels")}
    if options["processes"] > 1:  # or each of them would start as many threads as there are cores
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    job = Conversion(origins=parse_origins(dataset, splits), **options)
    job.check()
    adopt_hub_token()

    from overture.data.convert import convert

    convert(job)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
