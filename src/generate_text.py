"""Ask a trained model: a prompt, the rows of a dataset, or in a conversation.

    python src/generate_text.py runs/quickstart --prompt_template dolly --prompt "Where is Oslo?"
    python src/generate_text.py runs/dolly --data new.jsonl --sample 100 --out answers.jsonl
    python src/generate_text.py meta-llama/Llama-3.2-1B-Instruct --chat
    python src/generate_text.py runs/oasst1 --chat --data threads.jsonl --out answers.jsonl
    composer -n 2 src/generate_text.py runs/dolly --data new.jsonl --out answers.jsonl

MODEL is a run, a checkpoint, a folder of transformers' or of peft's, or a hub name.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from overture.config.load import read_options
from overture.data.conversion import Conversion, Origin, parse_fields
from overture.data.prompts import chat_template, parse_template, template
from overture.errors import ConfigError, exit_on_error

SOURCE = ("data_subset", "revision", "text_rows", "max_rejected")
DEPENDENT = dict.fromkeys((*SOURCE, "split", "field", "columns", "sample"), "data")
DEPENDENT["overwrite"] = "out"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("model", nargs="?")
    add("--adapter", help="a run, or adapters of peft's (a folder, a hub name) for MODEL")
    add("--prompt", **several, help="texts, as they are or for the one field of --prompt_template")
    add("--data", help="all that src/convert_dataset.py takes as --dataset")
    add("--split", default="train", help="of the dataset; so are the next six")
    add("--data_subset")
    add("--revision")
    add("--field", **several, metavar="OURS=THEIRS")
    add("--columns", **several)
    add("--text_rows", choices=["file", "line", "block"], default="file")
    add("--max_rejected", type=float, default=0.01)
    add("--sample", type=int, help="so many rows, drawn by --seed; default: all")
    add("--prompt_template", help="default for --data: the run's own, while its data are there")
    add("--chat", action="store_true", help="talk in the terminal; with --data: its rows are talks")
    add("--out", type=Path, metavar="FILE.jsonl")
    add("--overwrite", action="store_true")
    add("--max_new_tokens", type=int, help="of an answer; default: 64, talking 512")
    add("--batch_size", type=int, default=16)
    add("--num_beams", type=int, default=1)
    drawn = "draw tokens, rather than take the likeliest"
    add("--temperature", type=float, help=drawn)
    add("--top_p", type=float, help=drawn)
    add("--top_k", type=int, help=drawn)
    add("--stop", **several, help="texts that end an answer")
    add("--seed", type=int, default=17)
    add("--device_map", choices=["auto"], help="spread the model over the devices that there are")
    add("--trust_remote_code", action="store_true", help="run a hub model's code; read it before")
    add("--load_unverified", action="store_true", help="a checkpoint of others, which is a pickle")
    add("--config", help="YAML of these options; its prompt may be sections, response and cut")
    args, made = parser.parse_args(), None
    if args.config:
        flags, apart = read_options(args.config, vars(args), {"model": str, "prompt": dict})
        parser.set_defaults(model=apart.get("model"))
        if "prompt" in apart:
            made = parse_template(apart["prompt"], f"{args.config}: prompt")
        args = parser.parse_args([*flags, *sys.argv[1:]])
        if made and (args.chat or args.prompt_template):
            raise ConfigError(f"{args.config}: prompt: leave --chat and --prompt_template out then")
    if not args.model:
        raise ConfigError("MODEL is missing: a run, a folder or a hub name (see --help)")
    if bool(args.prompt) + bool(args.data or args.chat) != 1:
        raise ConfigError("give one of --prompt, --data and --chat")
    if args.chat and not args.data and (args.out or args.num_beams > 1):
        raise ConfigError("--chat answers word by word, in the terminal: no --out and --num_beams")
    if args.max_new_tokens is None:
        args.max_new_tokens = 512 if args.chat and not args.data else 64
    for name, of in DEPENDENT.items():
        if getattr(args, name) != parser.get_default(name) and not getattr(args, of):
            raise ConfigError(f"--{name} is of --{of}: give that too")
    if args.out and (args.out.is_dir() or (args.out.exists() and not args.overwrite)):
        raise ConfigError(f"--out {args.out} is there already; give --overwrite to replace a file")
    if args.out and not args.out.parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {args.out.parent}")
    least = dict.fromkeys(("max_new_tokens", "batch_size", "num_beams", "top_k", "sample"), 1)
    for name, low in {**least, "temperature": 1e-6, "top_p": 1e-6}.items():
        value = getattr(args, name)
        if value is not None and (value < low or (name == "top_p" and value > 1)):
            raise ConfigError(f"--{name} {value}: is out of range")
    if "" in args.stop:
        raise ConfigError("--stop '': an empty text ends every answer before it begins")
    if args.prompt_template:
        made = (chat_template if args.chat else template)(args.prompt_template)
    asked = args.prompt
    if args.data:
        options = {"fields": parse_fields(args.field), "columns": tuple(args.columns)}
        options |= {name: getattr(args, name) for name in SOURCE}
        options |= {"task": "chat", "tokenizer": args.model} if args.chat else {"task": "jsonl"}
        asked = Conversion({"train": Origin(args.data, args.split)}, out_root="", **options)
        asked.check()
    drawn = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    options = {name: getattr(args, name) for name in ("max_new_tokens", "num_beams", "stop")}
    options |= {"do_sample": True, **drawn} if set(drawn.values()) != {None} else {}

    from overture.generate import generate, join_ranks
    from overture.trained import load_trained

    join_ranks(int(os.environ.get("WORLD_SIZE", "1")), bool(args.data), args.device_map)
    load = (args.model, args.adapter, args.trust_remote_code, args.load_unverified, args.device_map)
    rows = (args.sample, args.seed, args.batch_size, args.out)
    generate(load_trained(*load), asked, made, *rows, **options)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
