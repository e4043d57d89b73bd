"""Batched generation beside transformers' own, greedily, on 100 prompts of JSQuAD.

    OVERTURE_DATA=... python benchmarks/generate_throughput.py

A Llama of 6 layers x 384, freshly initialised, with a byte-level tokenizer trained on JaQuAD, in
float32 and bfloat16. Sides: ours (`overture.generate.answer`, which puts prompts of like length
together), `generate` prompt by prompt, and `generate` with the prompts padded on the left in the
order they come, 16 at a time as ours. All make 32 tokens of each prompt, with the end of text
forbidden, so that sides do equal work, and their texts are compared. Rounds take turns, medians
count. After that adapters are asked as adapters and merged in memory: how fast, and how far logits
differ.
Writes benchmarks/results/generate_throughput.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from turns import RESULTS, environment

from overture.config.schema import ModelConfig
from overture.data.conversion import Conversion, Origin
from overture.generate import GREEDY, answer, encode_prompts, read_rows
from overture.models.build import load_network
from overture.models.lora import add_lora
from overture.tokenizer import load_tokenizer
from overture.training.cores import use_cores

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2,
    "max_position_embeddings": 2048,
}  # fmt: skip
NEW, BATCH, COUNT, ROUNDS = 32, 16, 100, 3


def prompts_of(data: Path, folder: Path) -> tuple[Any, list[list[int]]]:
    """Return a tokenizer and the ids of the prompts."""
    command = [sys.executable, "src/train_tokenizer.py", "--vocab_size", "8000"]
    command += ["--input", str(data / "jaquad" / "jaquad_dev.json.gz"), "--out", str(folder / "t")]
    command += ["--prompt_template", "jsquad"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    tokenizer = load_tokenizer(str(folder / "t"))
    origin = Origin(str(data / "jglue" / "jsquad-valid-v1.3.json"))
    rows, template = read_rows(Conversion({"train": origin}, "jsonl", ""), None, COUNT, 17)
    return tokenizer, encode_prompts(rows, template, tokenizer, 1500)


def sides(model: Any, tokenizer: Any, prompts: list[list[int]]) -> dict[str, Callable]:
    """Return what makes the texts of all prompts, by side."""
    forced = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    known = {**GREEDY, **forced, "pad_token_id": tokenizer.pad_token_id}

    def ours() -> list[str]:
        return answer(model, tokenizer, prompts, BATCH, **forced)[0]

    @torch.no_grad()
    def batched(size: int) -> list[str]:
        texts = []
        for begin in range(0, len(prompts), size):
            few = {"input_ids": prompts[begin : begin + size]}
            given = tokenizer.pad(few, padding_side="left", return_tensors="pt")
            made = model.generate(**given, **known)[:, given["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(made, skip_special_tokens=True)
        return texts

    return {"ours": ours, "one by one": lambda: batched(1), "padded": lambda: batched(BATCH)}


def compare(model: Any, tokenizer: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return tokens per second of each side, and how many texts are ours."""
    every = sides(model, tokenizer, prompts)
    times: dict[str, list[float]] = {name: [] for name in every}
    texts: dict[str, list[str]] = {}
    for number in range(ROUNDS + 1):  # the first is not counted
        for name in list(every)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            texts[name] = every[name]()
            if number:
                times[name].append(time.perf_counter() - start)
    tokens = NEW * len(prompts)
    rates = {name: tokens / statistics.median(found) for name, found in times.items()}
    same = {
        name: sum(a == b for a, b in zip(texts["ours"], found, strict=True))
        for name, found in texts.items()
    }
    return {"tokens_per_second": rates, "texts_as_ours": same, "times": times}


@torch.no_grad()
def merged(model: Any, tokenizer: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return the rate with adapters as they are and merged, and how far their logits differ."""
    adapted = add_lora(model, 16, 32, 0.0, "all-linear").eval()
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            weights.normal_(0, 0.02)
    forced = {"max_new_tokens": NEW, "min_new_tokens": NEW}

    def rate() -> float:
        start = time.perf_counter()
        answer(adapted, tokenizer, prompts, BATCH, **forced)
        return NEW * len(prompts) / (time.perf_counter() - start)

    ids = torch.tensor([prompts[0]])
    rate()
    found: dict[str, list[float]] = {"adapters": [], "merged": []}
    logits = {}
    for _ in range(ROUNDS):
        for name in found:
            adapted.merge_adapter() if name == "merged" else None
            logits[name] = adapted(input_ids=ids).logits.float()
            found[name].append(rate())
            adapted.unmerge_adapter() if name == "merged" else None
    difference = (logits["merged"] - logits["adapters"]).abs().max() / logits["adapters"].std()
    rates = {name: statistics.median(each) for name, each in found.items()}
    return {"tokens_per_second": rates, "largest_difference_in_spreads": difference.item()}


def main() -> None:
    """Measure, print and write the results."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(use_cores())
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, prompts = prompts_of(Path(os.environ["OVERTURE_DATA"]), Path(folder))
        lengths = sorted(map(len, prompts))
        print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens")
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            model = load_network(ModelConfig("llama", False, dtype, config=SHAPE), tokenizer).eval()
            found[dtype] = compare(model, tokenizer, prompts)
            rates = found[dtype]["tokens_per_second"]
            best = max(rate for name, rate in rates.items() if name != "ours")
            shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            print(f"{dtype}: {shown} tokens/s: {rates['ours'] / best:.2f} times the best")
            print(f"texts as ours: {found[dtype]['texts_as_ours']}", flush=True)
            found[dtype]["adapters"] = merged(model, tokenizer, prompts)
            print(f"{dtype}: {found[dtype]['adapters']}", flush=True)
    result = {"program": "generate_throughput", "environment": environment(), "found": found}
    (RESULTS / "generate_throughput.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
