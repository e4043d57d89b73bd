"""Export a run as a folder that plain transformers or peft load, prove it, and upload it.

    python src/export_model.py runs/quickstart --out exported/quickstart --merge
    python src/export_model.py runs/dolly --out dolly --merge --push_to_hub me/dolly --private

MODEL is a run, a checkpoint, a folder of transformers' or of peft's, or a hub name.
"""

import argparse
import signal
import sys
from pathlib import Path

from overture.errors import ConfigError, exit_on_error


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("model")
    add("--out", type=Path, required=True)
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--merge", action="store_true", help="adapters into their base")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights; default: as trained")
    add("--license", default="unknown", help="for the card: a name of the hub's, as cc-by-sa-3.0")
    asking = "print its first 24 tokens of answer, downloaded if it was uploaded"
    add("--test_prompt", metavar="TEXT", help=asking)
    add("--push_to_hub", metavar="NAME", help="upload it, with the token in HF_TOKEN")
    add("--private", action="store_true")
    add("--trust_remote_code", action="store_true", help="run a hub model's code; read it before")
    add("--load_unverified", action="store_true", help="a checkpoint of others, which is a pickle")
    args = parser.parse_args()
    if args.private and not args.push_to_hub:
        raise ConfigError("--private says how --push_to_hub uploads: give that too")

    from overture.export import check_out, encode_test_prompt, export_model, say
    from overture.hub import check_hub, model_card, push_to_hub
    from overture.trained import load_trained

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no part
    check_out(args.out, args.model, args.overwrite)
    if args.push_to_hub:
        check_hub(args.push_to_hub)
    trained = load_trained(args.model, None, args.trust_remote_code, args.load_unverified)
    if base := trained.base:  # which may be an earlier export, that adapters are over
        check_out(args.out, base, args.overwrite)
    if args.push_to_hub and base and not args.merge and Path(base).exists():
        fault = f"the adapters are over {base}, which is on this machine alone"
        raise ConfigError(f"--push_to_hub: {fault}; give --merge")
    card = model_card(trained, args.merge, args.license)
    asked = encode_test_prompt(trained, args.test_prompt) if args.test_prompt else None
    how = (args.merge, args.dtype, card, args.trust_remote_code)
    loading = export_model(trained, args.out, *how)
    print(f"{args.out}: written")
    place = args.out
    if args.push_to_hub:
        place, address = push_to_hub(args.out, args.push_to_hub, args.private)
        print(address)
    if asked:
        between = "\n-> " if trained.head == "Seq2SeqLM" else ""
        print(args.test_prompt + between + say(place, loading, asked))


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
