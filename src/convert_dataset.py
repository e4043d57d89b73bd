"""Convert a dataset into MDS shards with a ledger, one folder per split.

    python src/convert_dataset.py --dataset databricks/databricks-dolly-15k --task instruct \
        --tokenizer meta-llama/Llama-3.2-1B --out_root data/dolly --test_fraction 0.1

A dataset is a file (jsonl, json, csv, tsv, parquet, txt; also .gz, .zst), a folder, a quoted
pattern, two line-aligned files as FILE,FILE, SQuAD-format json, a hub name, or `embedded`.
"""

import argparse
import os
import sys

from overture.data.conversion import OVERFLOWS, Conversion, parse_fields, parse_origins
from overture.errors import ConfigError, exit_on_error


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.argument_default = argparse.SUPPRESS  # the defaults are those of Conversion
    add = parser.add_argument
    add("--dataset", help="what to convert")
    written = "splits to write: of --dataset, or without it NAME=DATASET[a:b]; default: train"
    add("--splits", nargs="+", metavar="NAME=SPLIT[a:b]", help=written)
    add("--task", choices=list(OVERFLOWS))
    add("--out_root", help="a folder, or s3://bucket/path, gs://...")
    add("--tokenizer", help="a folder or hub name; --task text without one keeps raw text")
    add("--data_subset", help="of a hub dataset")
    add("--revision", help="of a hub dataset: a commit, tag or branch")
    add("--field", nargs="+", metavar="OURS=THEIRS", help="response=output ...")
    add("--columns", nargs="+", help="of csv or tsv files that have no header")
    blocks = "a document of a .txt file (block: between blank lines); default: file"
    add("--text_rows", choices=["file", "line", "block"], help=blocks)
    add("--threads", choices=["all", "best"], help="of conversation trees; default: all")
    add("--max_rows", type=int)
    add("--max_rejected", type=float, help="share of malformed rows put up with; default: 0.01")
    add("--prompt_template", help="a built-in one or a file (--task chat: a chat template)")
    add("--list_templates", action="store_true", help="show the built-in templates and exit")
    add("--test_fraction", type=float, help="share held out as split `test`")
    add("--stratify", metavar="FIELD", help="hold out the same share of each of its values")
    add("--seed", type=int, help="of the division; default: 17")
    add("--dedupe", action="store_true", help="drop rows that repeat an earlier one")
    add("--max_seq_len", type=int, help="tokens; default: 2048")
    too_long = "rows of more than max_seq_len tokens; default: split for text, else truncate_prompt"
    cuts = ["truncate_prompt", "truncate", "drop", "split", "error"]
    add("--overflow", choices=cuts, help=too_long)
    add("--packing", choices=["best_fit", "none"], help="default: best_fit, where a task can")
    add("--concat_tokens", type=int, metavar="N", help="text end to end, cut into rows of N tokens")
    add("--no_wrap", dest="wrap", action="store_false", help="with it: rows begin with documents")
    add("--bos_text", help="before each text, instead of the tokenizer's BOS ('' for none)")
    add("--eos_text", help="after each text, instead of the tokenizer's EOS ('' for none)")
    add("--labels", nargs="+", help="names of the classes, in the order of their ids")
    add("--regression", action="store_true", help="labels are numbers")
    add("--compression", choices=["zstd"])
    add("--size_limit", type=int, help="bytes per shard; default: 64 MiB")
    add("--engine", choices=["local", "spark"], help="what tokenises and writes; default: local")
    add("--processes", type=int, help="that tokenise; default: 1, with the tokenizer's threads")
    add("--overwrite", action="store_true", help="replace splits that are there")
    add("--resume", action="store_true", help="go on with what was interrupted")
    add("--merge", nargs="+", metavar="FOLDER", help="make one dataset of those converted in parts")
    options = vars(parser.parse_args())
    if options.pop("list_templates", False):
        from overture.data.prompts import list_templates

        print("\n".join(list_templates()))
        return
    if "merge" in options:
        from overture.data.merge import merge_parts

        merge_parts(**options)
        return
    for name in ("task", "out_root"):
        if name not in options:
            raise ConfigError(f"--{name} is missing (see --help)")
    dataset, concat = options.pop("dataset", None), options.pop("concat_tokens", None)
    splits = options.pop("splits", [])
    if dataset is None and not splits:
        raise ConfigError("--dataset is missing: a file, a folder, a hub name or `embedded`")
    if concat is not None:
        if options.keys() & {"packing", "max_seq_len"}:
            raise ConfigError("--concat_tokens excludes --packing and --max_seq_len")
        options.update(packing="concat", max_seq_len=concat)
    options["fields"] = parse_fields(options.pop("field", []))
    if options.get("processes", 1) > 1:  # or each of them would start a thread for every core
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.get("engine") == "spark":  # its workers would take any python3 that they find
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    job = Conversion(origins=parse_origins(dataset, splits), **options)
    job.check()

    from overture.data.convert import convert

    convert(job)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
