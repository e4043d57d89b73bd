"""English to Japanese from nothing on two cores: dev BLEU as it trains, test BLEU at its end.

    OVERTURE_DATA=... python benchmarks/translate_enja.py [--pairs N] [a.b=c ...]

Runs what yamls/finetune/enja.yaml says, from the tokenizer on, and asks the run for the test set,
which nothing has seen. BLEU is sacrebleu's: over the set's own words (`none`), and over characters.
Time to train is from the first touch of the training data to the last evaluation, with all of them.
With --pairs it has the first N alone, too few not to overfit. Writes
benchmarks/results/translate_enja.json, with --pairs translate_enja_<N>.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from sacrebleu import corpus_bleu, corpus_chrf
from turns import RESULTS, environment

ROOT = Path(__file__).parents[1]
FOLDER, RUN = "data/enja-benchmark", "runs/enja-benchmark"


def main() -> None:
    """Train, translate, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, help="how many pairs to train on; default: all")
    args, overrides = parser.parse_known_args()
    name = "translate_enja" + (f"_{args.pairs}" if args.pairs else "")
    fewer = ("--max_rows", args.pairs) if args.pairs else ()
    data = Path(os.environ["OVERTURE_DATA"]) / "small_parallel_enja"

    def call(*command: object) -> None:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)

    pairs = {split: f"{data / split}.en,{data / split}.ja" for split in ("train", "dev", "test")}
    subprocess.run(["rm", "-rf", RUN, FOLDER], cwd=ROOT, check=True)
    tokenizer = f"{FOLDER}/tokenizer"
    call("src/train_tokenizer.py", "--input", *pairs["train"].split(","), "--model", "bpe",
         "--vocab_size", 6000, "--out", tokenizer)  # fmt: skip
    splits = [f"{split}={pairs[split]}" for split in ("train", "dev")]
    call("src/convert_dataset.py", "--task", "seq2seq", "--tokenizer", tokenizer, "--max_seq_len",
         32, "--splits", *splits, "--out_root", FOLDER, *fewer)  # fmt: skip
    places = (f"data_local={FOLDER}", f"tokenizer_name={tokenizer}", f"run_folder={RUN}")
    call("finetune.py", "yamls/finetune/enja.yaml", *places, *overrides)
    found = {}
    for beams in (1, 4):
        out = ROOT / RUN / f"test-{beams}.jsonl"
        call("src/generate_text.py", RUN, "--data", pairs["test"], "--prompt_template", "pair",
             "--max_new_tokens", 48, "--batch_size", 100, "--num_beams", beams,
             "--out", out)  # fmt: skip
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        said = [row["answer"].strip() for row in rows]
        truth = [[row["expected"].strip() for row in rows]]
        found[f"{beams} beams"] = {
            "bleu_words": corpus_bleu(said, truth, tokenize="none").score,
            "bleu_characters": corpus_bleu(said, truth, tokenize="char").score,
            "chrf": corpus_chrf(said, truth).score,
        }
        print(beams, found[f"{beams} beams"], flush=True)
    lines = (ROOT / RUN / "metrics.jsonl").read_text().splitlines()
    evals = [r for r in map(json.loads, lines) if r["kind"] == "eval"]
    result = json.loads((ROOT / RUN / "result.json").read_text())
    written = {"program": name, "overrides": overrides, "test": found, "dev": evals,
               "result": result, "environment": environment()}  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
