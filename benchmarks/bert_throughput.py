"""MosaicBERT beside HF BERT with SDPA: a forward and a backward pass of masked language modelling.

    OVERTURE_DATA=... python benchmarks/bert_throughput.py [--losses]

Both have as many parameters within 2 % (the gated linear unit is narrower), no dropout (with it
transformers would leave its fast attention kernel), and see the same batches of 32 sequences with
30 % of the tokens masked. Ours are padded to 128 tokens, as the collator has them, and unpadded in
the model; theirs are padded to the longest of the batch, as is usual. bfloat16 is autocast over
float32 weights. Sequences are cut at 128 tokens: documents of C4, paragraphs of the English
Wikipedia, training sentences of SST-2, and pieces of Wikipedia of 128 each. After a pass over the
batches that is not timed, the sides take turns; of each batch the median of the rounds counts.

With --losses instead both are trained on the same batches of Wikipedia and WikiText-2, three seeds
each, and asked for the loss on held-out text. Writes benchmarks/results/bert_throughput.json or
bert_losses.json.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import torch
from transformers import BertTokenizerFast
from turns import RESULTS, environment

from overture.config.schema import ModelConfig
from overture.data.collate import TokenCollator
from overture.data.masking import MaskingCollator
from overture.models.build import load_network
from overture.models.masked_lm import MaskedLM
from overture.training.cores import use_cores

LENGTH, BATCH = 128, 32
BARS = {"geometric mean": 1.6, "SST-2": 2.7, "no padding": 1.0}


def texts(data: Path) -> dict[str, list[str]]:
    """Return what each set of sequences is made of."""

    def lines(name: str) -> list[str]:
        documents = map(json.loads, (data / "text" / name).read_text("utf-8").splitlines())
        return [document["text"] for document in documents]

    with (data / "glue" / "SST-2" / "train.tsv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    wiki = [p for text in lines("enwiki-sample.jsonl") for p in text.split("\n") if p.strip()]
    return {"C4": lines("c4-en-300.jsonl"), "enwiki": wiki, "SST-2": [row[0] for row in rows[1:]]}


def pieces(tokenizer: Any, found: list[str], end_to_end: bool) -> list[list[int]]:
    """Return sequences of at most LENGTH ids between CLS and SEP."""
    inside = LENGTH - 2
    ids = tokenizer(found, add_special_tokens=False)["input_ids"]
    if end_to_end:
        ids = [token for text in ids for token in text]
        ids = [ids[i : i + inside] for i in range(0, len(ids) - inside + 1, inside)]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [[cls, *one[:inside], sep] for one in ids if one]


def rows_of(sequences: list[list[int]]) -> list[dict[str, Any]]:
    """Return rows as a stream of ours yields them."""
    rows = []
    for number, ids in enumerate(sequences):
        facts = {"document_ends": np.uint32([len(ids)]), "sample_id": number, "epoch": 0}
        mask = np.ones(len(ids), np.uint8)
        rows.append({"input_ids": np.array(ids, np.uint16), "loss_mask": mask, **facts})
    return rows


def networks(tokenizer: Any, layers: int, width: int) -> dict[str, Any]:
    """Return both models, freshly initialised, with parameters alike within 2 %."""
    plain = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    # A gated linear unit has three matrices where BERT has two.
    gated = plain | {"intermediate_size": round(8 * width / 3 / 32) * 32}
    built = {}
    for name, shape in {"mosaic_bert": gated, "hf_bert": plain}.items():
        wanted = ModelConfig(name, False, config=shape)
        built[name] = load_network(wanted, tokenizer, LENGTH, "MaskedLM")
    assert built["hf_bert"].config._attn_implementation == "sdpa"
    counts = [sum(p.numel() for p in network.parameters()) for network in built.values()]
    if abs(counts[0] / counts[1] - 1) > 0.02:
        raise SystemExit(f"{counts} parameters are not alike")
    return built


def steps(tokenizer: Any, layers: int, width: int, bfloat16: bool) -> dict[str, Callable]:
    """Return for each side what takes a batch forward and backward and returns the loss."""
    both = networks(tokenizer, layers, width)
    ours = MaskedLM(both["mosaic_bert"], tokenizer, None, cpu_autocast=bfloat16).train()
    theirs = both["hf_bert"].train()

    def our_step(batch: dict[str, Any]) -> float:
        ours.zero_grad()
        loss = ours.loss(ours(batch), batch)
        loss.backward()
        return loss.item()

    def their_step(batch: dict[str, Any]) -> float:
        theirs.zero_grad()
        longest = max(batch["num_tokens"])
        mask = (batch["document_starts"][:, :longest] >= 0).long()
        ids, labels = (batch[name][:, :longest].contiguous() for name in ("input_ids", "labels"))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.item()

    return {"mosaic_bert": our_step, "hf_bert": their_step}


def compare(sides: dict[str, Callable], batches: list[Any], rounds: int) -> dict[str, Any]:
    """Return seconds of each side over all batches, medians of the rounds, and real tokens."""
    times = {side: [[] for _ in batches] for side in sides}
    for number in range(rounds + 1):  # the first is not counted
        for place, batch in enumerate(batches):
            for side in list(sides)[:: 1 if (number + place) % 2 else -1]:
                start = time.perf_counter()
                sides[side](batch)
                if number:
                    times[side][place].append(time.perf_counter() - start)
    seconds = {side: sum(map(statistics.median, found)) for side, found in times.items()}
    tokens = sum(sum(batch["num_tokens"]) for batch in batches)
    padded = sum(BATCH * max(batch["num_tokens"]) for batch in batches)
    return {
        "ratio": seconds["hf_bert"] / seconds["mosaic_bert"],
        "padding_of_longest": 1 - tokens / padded,
        "tokens_per_second": {side: tokens / found for side, found in seconds.items()},
        "times": times,
    }


def throughput(args: argparse.Namespace, data: Path, tokenizer: Any) -> dict[str, Any]:
    """Measure every set of sequences in both types, print the table and return it."""
    pads = TokenCollator(LENGTH, tokenizer.pad_token_id)
    collate = MaskingCollator(pads, tokenizer, 0.3, 17, anew=True)
    found = texts(data)
    sets = {name: pieces(tokenizer, one, end_to_end=False) for name, one in found.items()}
    sets["no padding"] = pieces(tokenizer, found["enwiki"], end_to_end=True)
    result = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        sides = steps(tokenizer, args.layers, args.width, dtype == "bfloat16")
        table = {}
        for name, sequences in sets.items():
            rows = rows_of(sequences)
            order = np.random.default_rng(17).permutation(len(rows))
            chosen = [[rows[i] for i in order[k * BATCH : (k + 1) * BATCH]]
                      for k in range(args.batches)]  # fmt: skip
            row = table[name] = compare(sides, [collate(few) for few in chosen], args.rounds)
            rates = (f"{side} {rate:,.0f}" for side, rate in row["tokens_per_second"].items())
            print(
                f"{dtype} {name}: {', '.join(rates)} tokens/s, {row['ratio']:.2f} times, "
                f"{row['padding_of_longest']:.0%} of theirs padding",
                flush=True,
            )
        three = [table[name]["ratio"] for name in found]
        ratios = {name: row["ratio"] for name, row in table.items()}
        ratios["geometric mean"] = math.prod(three) ** (1 / 3)
        bars = {name: f"{ratios[name]:.2f} (bar {bar})" for name, bar in BARS.items()}
        print(f"{dtype}: {bars}", flush=True)
        result[dtype] = {"ratios": ratios, "sets": table}
    return result


def losses(args: argparse.Namespace, data: Path, tokenizer: Any) -> dict[str, Any]:
    """Train both on the same batches, print and return their held-out losses."""
    found = texts(data)["enwiki"]
    found += (data / "text" / "wikitext2-raw-train-first1MB.txt").read_text("utf-8").split("\n")
    rows = rows_of(pieces(tokenizer, found, end_to_end=True))
    order = np.random.default_rng(17).permutation(len(rows)).tolist()
    test, train = [rows[i] for i in order[:512]], [rows[i] for i in order[512:]]
    pads = TokenCollator(LENGTH, tokenizer.pad_token_id)
    result = {}
    for seed in (1, 2, 3):
        collate = MaskingCollator(pads, tokenizer, 0.3, seed, anew=True)
        asked = MaskingCollator(pads, tokenizer, 0.15, 17, anew=False)
        for name in ("mosaic_bert", "hf_bert"):
            torch.manual_seed(seed)
            network = networks(tokenizer, args.layers, args.width)[name]
            model = MaskedLM(network, tokenizer, None, cpu_autocast=True)
            optimizer = torch.optim.AdamW(
                model.parameters(), 1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True
            )
            rising = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / (0.06 * args.steps), 1 - step / args.steps)
            )
            chance = np.random.default_rng(seed)
            for step in range(args.steps):
                few = [train[i] | {"epoch": step} for i in chance.integers(len(train), size=BATCH)]
                batch = collate(few)
                model.loss(model(batch), batch).backward()
                optimizer.step()
                rising.step()
                optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                each = [model(asked(test[i : i + 64]))["token_losses"] for i in range(0, 512, 64)]
            result.setdefault(name, []).append(torch.cat(each).mean().item())
            print(f"seed {seed} {name}: {result[name][-1]:.4f} nats", flush=True)
    return result


def main() -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", action="store_true", help="train, instead of timing")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batches", type=int, default=3, help="of each set")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed")
    parser.add_argument("--steps", type=int, default=400, help="of training, with --losses")
    args = parser.parse_args()
    data = Path(os.environ["OVERTURE_DATA"])
    vocabulary = data / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    tokenizer = BertTokenizerFast(vocab_file=str(vocabulary))
    counts = {n: sum(p.numel() for p in network.parameters())
              for n, network in networks(tokenizer, args.layers, args.width).items()}  # fmt: skip
    print(f"parameters: {counts}\n{use_cores()}", flush=True)
    name = "bert_losses" if args.losses else "bert_throughput"
    found = (losses if args.losses else throughput)(args, data, tokenizer)
    result = {"program": "bert_throughput", "arguments": vars(args), "parameters": counts,
              "environment": environment(), "found": found}  # fmt: skip
    print(json.dumps(result["environment"], indent=1))
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
