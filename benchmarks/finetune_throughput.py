"""LoRA fine-tuning on real Dolly: ours beside HF Trainer with PEFT, and TRL's SFTTrainer.

    OVERTURE_DATA=... python benchmarks/finetune_throughput.py [--search] [--windows 5]

A Llama of 8 layers x 512 (8 heads, 4 key-value heads, 1,376 wide MLP, tied embeddings, GPT-2's
vocabulary), LoRA r=16 on all linear layers, documents of at most 1,024 tokens, two cores. Each side
is its own library's Trainer in a process of its own, on the same weights and documents; the
processes take turns, a timed window each, until each has had its share. Before that, our loss and
that of transformers must be equal on the same documents. Counted are real tokens: padding is none.
Memory is peak resident size above that after the imports. `--search` tries batch sizes of 1, 2, 4
and 8 first; without it the best ones of the stored results are used. TRL is in
requirements-benchmark.txt. Writes benchmarks/results/finetune_throughput.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
OUT = ROOT / "benchmarks" / "results" / "finetune_throughput.json"
LENGTH = 1024
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "tie_word_embeddings": True, "max_position_embeddings": LENGTH,
}  # fmt: skip
# side -> options: library, dtype of the base, padding of a batch, packing of documents
SIDES = {
    "ours": {"library": "ours", "dtype": "bfloat16"},
    "hf float32": {"library": "hf", "dtype": "float32"},
    "hf float32, fixed length": {"library": "hf", "dtype": "float32", "fixed": True},
    "hf bfloat16": {"library": "hf", "dtype": "bfloat16"},
    "hf bfloat16, fixed length": {"library": "hf", "dtype": "bfloat16", "fixed": True},
    "trl bfloat16": {"library": "trl", "dtype": "bfloat16"},
    "trl bfloat16, packed": {"library": "trl", "dtype": "bfloat16", "packing": True},
}
# Ours with one of its gains switched off, for benchmarks/ablation.py.
WITHOUT = {
    "ours without blocks of attention": {"attention": "sdpa"},
    "ours without chunks of logits": {"switch": "loss"},
    "ours without its LoRA layer": {"switch": "lora"},
    "ours without a bfloat16 base": {"dtype": "float32"},
    "ours without packing": {"data": "unpacked"},
}
# From scratch, all weights trained, on text in rows of 1,024: for pretrain_throughput.py.
PRETRAIN = {
    "ours, pretraining": {"library": "ours", "precision": "amp_bf16"},
    "ours, pretraining in float32": {"library": "ours"},
    "hf, pretraining": {"library": "hf"},
    "hf, pretraining with bfloat16 autocast": {"library": "hf", "autocast": True},
}
PRETRAIN = {n: {"dtype": "float32", "data": "text", "all": True, **o} for n, o in PRETRAIN.items()}
ALL = (
    SIDES
    | PRETRAIN
    | {n: {"library": "ours", "dtype": "bfloat16", **o} for n, o in WITHOUT.items()}
)
BATCH_SIZES = (1, 2, 4, 8)
WARM_UP_SECONDS, WINDOW_SECONDS = 15.0, 8.0


class Windows:
    """Counts tokens step by step, and after each window waits for the word to go on."""

    def __init__(self, imported: float) -> None:
        self.imported, self.window = imported, WARM_UP_SECONDS
        self.tokens = self.labels = self.steps = 0
        self.start = time.perf_counter()

    def count(self, tokens: int, labels: int) -> None:
        """Add a batch."""
        self.tokens, self.labels = self.tokens + tokens, self.labels + labels

    def step(self) -> None:
        """End a step."""
        self.steps += 1
        seconds = time.perf_counter() - self.start
        if seconds < self.window:
            return
        record = {"seconds": seconds, "tokens": self.tokens, "labels": self.labels,
                  "steps": self.steps, "peak_mib": peak_mib() - self.imported}  # fmt: skip
        print("WINDOW " + json.dumps(record), flush=True)
        if not sys.stdin.readline().strip():
            os._exit(0)
        self.window = WINDOW_SECONDS
        self.tokens = self.labels = self.steps = 0
        self.start = time.perf_counter()


def peak_mib() -> float:
    """Return the greatest resident size of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def documents(data: Path) -> list[dict[str, list[int]]]:
    """Return the documents of the packed split, in a fixed random order."""
    import random

    from overture.data.shards import Split

    split, found = Split(data / "train"), []
    for number in range(len(split)):
        row, start = split.row(number), 0
        for end in row["document_ends"].tolist():
            ids, mask = row["input_ids"][start:end].tolist(), row["loss_mask"][start:end].tolist()
            labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
            found.append({"input_ids": ids, "labels": labels})
            start = end
    random.Random(17).shuffle(found)
    return found


def run_ours(folder: Path, batch: int, side: dict[str, Any], imported: float) -> None:
    """Train by the recipe itself."""
    from composer.core import Callback

    from overture.config.load import load_config
    from overture.training import run

    windows = Windows(imported)

    class Report(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            windows.count(sum(state.batch["num_tokens"]), sum(state.batch["num_labels"]))
            windows.step()

    run.build_callbacks = lambda config: [Report()]
    switch_off(side.get("switch"))
    text = {
        "run_name": f"benchmark-{os.getpid()}", "max_seq_len": LENGTH,
        "task": "causal_lm" if side.get("all") else "instruct",
        "data_local": str(folder / side.get("data", "data")),
        "tokenizer_name": str(folder / "gpt2"),
        "model": {"name": str(folder / "model"), "dtype": side["dtype"],
                  "attention": side.get("attention", "auto")},
        "trainable": "all" if side.get("all") else "lora",
        "precision": side.get("precision", "fp32"),
        "train_loader": {"dataset": {"split": "train", "shuffle": True}, "drop_last": True},
        "scheduler": {"name": "constant_with_warmup"}, "max_duration": "1000ep",
        "save_interval": "1000ep", "global_train_batch_size": batch,
        "device_train_microbatch_size": batch, "progress_bar": False,
        "run_folder": str(folder / f"run-{os.getpid()}"),
    }  # fmt: skip
    path = folder / f"ours-{os.getpid()}.yaml"
    path.write_text(json.dumps(text))
    run.train(load_config([str(path)], (text["task"],)), "benchmark")


def switch_off(what: str | None) -> None:
    """Put what most would write in place of one of our parts."""
    import torch

    from overture.models import build, lora

    def all_logits(hidden: Any, head: Any, targets: Any, *_: Any) -> tuple[Any, Any]:
        losses = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
        return losses.sum(), losses.detach()

    if what == "loss":
        build.cross_entropy_at = all_logits
    if what == "lora":
        from peft.tuners.lora import Linear

        lora._layer_class = lambda: Linear


def run_peer(folder: Path, batch: int, side: dict[str, Any], imported: float) -> None:
    """Train by transformers' Trainer or TRL's."""
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )  # fmt: skip

    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, side["dtype"]), use_cache=False
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    windows = Windows(imported)

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask, ids = kwargs.get("attention_mask"), kwargs["input_ids"]
        windows.count(
            int(ids.numel() if mask is None else mask.sum()), int((kwargs["labels"] != -100).sum())
        )

    class Report(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            windows.step()

    rows = documents(folder / side.get("data", "data"))
    common = {
        "output_dir": str(folder / "peer"), "per_device_train_batch_size": batch, "use_cpu": True,
        "max_steps": 10**6, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "logging_steps": 10**6, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "learning_rate": 1e-4,
    }  # fmt: skip
    if side["library"] == "hf":
        model = model if side.get("all") else get_peft_model(model, lora)
        pad = {"padding": "max_length", "max_length": LENGTH} if side.get("fixed") else {}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**common, bf16=side.get("autocast", False)),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, **pad),
            callbacks=[Report()],
        )
        if side.get("fixed"):
            trainer.data_collator = FixedLength(tokenizer.pad_token_id)
    else:
        from trl import SFTConfig, SFTTrainer

        for row in rows:
            row["completion_mask"] = [int(label != -100) for label in row.pop("labels")]
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **common, bf16=False, packing=side.get("packing", False), max_length=LENGTH,
                completion_only_loss=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Report()],
        )  # fmt: skip
    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()


class FixedLength:
    """Pads every batch to the same length."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        def filled(name: str, value: int) -> Any:
            return torch.tensor([r[name] + [value] * (LENGTH - len(r[name])) for r in rows])

        mask = [[1] * len(r["input_ids"]) + [0] * (LENGTH - len(r["input_ids"])) for r in rows]
        return {
            "input_ids": filled("input_ids", self.pad),
            "labels": filled("labels", -100),
            "attention_mask": torch.tensor(mask),
        }


def work(name: str, batch: int, folder: Path) -> None:
    """Be one side; its imports are no part of its memory."""
    import composer  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import streaming  # noqa: F401
    import transformers  # noqa: F401

    side = ALL[name]
    if side["library"] == "trl":
        import trl  # noqa: F401
    (run_ours if side["library"] == "ours" else run_peer)(folder, batch, side, peak_mib())


class Side:
    """A process that trains for a window when asked."""

    def __init__(self, name: str, batch: int, folder: Path) -> None:
        self.name, self.batch = name, batch
        self.log = (folder / f"{name.replace(' ', '-')}-{batch}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", name, str(batch), str(folder)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=folder,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.windows: list[dict[str, float]] = []
        self.read()  # the warm-up

    def read(self) -> dict[str, float]:
        """Wait for the end of a window and return it."""
        for line in self.process.stdout:
            if line.startswith("WINDOW "):
                return json.loads(line.removeprefix("WINDOW "))
        self.log.seek(0)
        raise SystemExit(f"{self.name} ended: {self.log.read()[-2000:]}")

    def run(self) -> None:
        """Train for one window."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.windows.append(self.read())

    def end(self) -> None:
        """Stop, and give the memory back."""
        self.process.stdin.write("\n")
        self.process.stdin.close()
        self.process.wait()

    def rate(self, what: str = "tokens") -> float:
        """Return the median over the windows, per second."""
        return statistics.median(w[what] / w["seconds"] for w in self.windows)


def prepare(folder: Path) -> None:
    """Write the tokenizer, the packed documents and the weights that all sides share."""
    import torch
    from convert_throughput import gpt2

    from overture.data.conversion import Conversion, Origin
    from overture.data.convert import convert
    from overture.models.build import load_causal_lm
    from overture.tokenizer import load_tokenizer

    data = Path(os.environ["OVERTURE_DATA"])
    tokenizer = gpt2(data, folder / "gpt2")
    origin = Origin(str(data / "dolly" / "databricks-dolly-15k.jsonl"))
    job = Conversion({"train": origin}, "instruct", str(folder / "data"), tokenizer=tokenizer,
                     max_seq_len=LENGTH)  # fmt: skip
    convert(job, say=lambda _: None)
    convert(replace(job, out_root=str(folder / "unpacked"), packing="none"), say=lambda _: None)
    text = replace(job, out_root=str(folder / "text"), task="text", packing="concat",
                   prompt_template="passage")  # fmt: skip
    convert(text, say=lambda _: None)
    torch.manual_seed(0)
    loaded = load_tokenizer(tokenizer)
    network = load_causal_lm("llama", False, "float32", "sdpa", SHAPE, loaded, LENGTH)
    network.save_pretrained(folder / "model")


def check_losses(folder: Path) -> dict[str, float]:
    """Return the loss of some documents by each route, having seen that they are equal."""
    import torch
    from transformers import AutoModelForCausalLM

    from overture.data.collate import TokenCollator
    from overture.data.shards import Split
    from overture.models.build import CausalLM, load_causal_lm
    from overture.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "gpt2"))
    split = Split(folder / "data" / "train")
    rows = [{**split.row(number), "sample_id": number} for number in range(2)]
    batch = TokenCollator(LENGTH, 0)(rows)
    network = load_causal_lm(str(folder / "model"), True, "float32", "auto", {}, tokenizer)
    model = CausalLM(network, tokenizer, None)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    total = count = 0.0
    with torch.no_grad():
        ours = model.loss(model(batch), batch).item()
        for number in range(2):
            start = 0
            for end in rows[number]["document_ends"].tolist():
                labels = batch["labels"][number : number + 1, start:end]
                learned = int((labels[:, 1:] != -100).sum())
                out = theirs(input_ids=batch["input_ids"][number : number + 1, start:end],
                             labels=labels)  # fmt: skip
                total, count, start = total + out.loss.item() * learned, count + learned, end
    losses = {"ours": ours, "transformers": total / count}
    if abs(losses["ours"] - losses["transformers"]) > 1e-3:
        raise SystemExit(f"the losses differ: {losses}")
    return losses


def search(names: list[str], folder: Path) -> dict[str, int]:
    """Return the best batch size of each side, by one window each."""
    best = {}
    for name in names:
        rates = {}
        for batch in BATCH_SIZES:
            side = Side(name, batch, folder)
            side.run()
            side.end()
            rates[batch] = side.rate()
        best[name] = max(rates, key=rates.get)
        print(f"{name}: " + ", ".join(f"{b}: {r:,.0f}" for b, r in rates.items()), flush=True)
    return best


def main(program: str = "finetune_throughput", names: list[str] | None = None) -> None:
    """Measure, print the table and write the results of `program`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--sides", nargs="+", default=names or list(SIDES), choices=list(ALL))
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], int(args.work[1]), Path(args.work[2]))
        return
    stored: dict[str, int] = {}
    for path in (OUT.with_name(f"{program}.json"), OUT):
        if path.exists():
            stored = {**json.loads(path.read_text())["batch_sizes"], **stored}
    if "ours" in stored:  # a part less does not ask for another batch size
        stored |= dict.fromkeys(WITHOUT, stored["ours"])
    import torch

    from overture.callbacks.throughput import measured_peak

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        losses = check_losses(folder)
        print(f"losses on the same documents: {losses}", flush=True)
        unknown = [side for side in args.sides if args.search or side not in stored]
        batches = {**stored, **search(unknown, folder)}
        sides = [Side(side, batches[side], folder) for side in args.sides]
        peaks = []
        for _ in range(args.windows):
            peaks.append(measured_peak(torch.bfloat16))
            for side in sides:
                side.run()
        for side in sides:
            side.end()
        lengths = [len(document["input_ids"]) for document in documents(folder / "data")]
        mean = sum(length**2 for length in lengths) / sum(lengths)
    report(program, sides, batches, losses, max(peaks), mean)


def report(
    program: str, sides: list[Side], batches: dict[str, int], losses: Any, peak: float, mean: float
) -> None:
    """Print the table, and write it with all windows."""
    from overture.flops import training_flops

    embedding = 50257 * SHAPE["hidden_size"]
    width, heads = SHAPE["hidden_size"], 64 * (2 * 8 + 2 * 4)
    layers = 8 * (width * heads + 3 * width * SHAPE["intermediate_size"])
    table = {}
    for side in sides:
        tokens, labels = side.rate("tokens"), side.rate("labels")
        every = ALL[side.name].get("all", False)
        squares = tokens * (LENGTH if every else mean)
        flops = training_flops(layers, embedding, not every, tokens, labels, 8, 512, squares)
        table[side.name] = {
            "batch": side.batch, "tokens_per_second": tokens, "labels_per_second": labels,
            "peak_mib": side.windows[-1]["peak_mib"], "share_of_matrix_products": flops / peak,
            "windows": side.windows,
        }  # fmt: skip
        print(f"{side.name:<28}{side.batch:>3}{tokens:>9,.0f} tokens/s{labels:>9,.0f} labels/s"
              f"{side.windows[-1]['peak_mib']:>8,.0f} MiB{flops / peak:>8.1%}")  # fmt: skip
    names = ("torch", "transformers", "peft", "trl", "mosaicml", "mosaicml-streaming")
    result = {
        "program": program, "losses": losses, "batch_sizes": batches,
        "bfloat16_gigaflops": peak / 1e9, "sides": table,
        "environment": {
            "processor": next(
                x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
                if x.startswith("model name")
            ),
            "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
            "versions": {n: version(n) for n in names},
        },
    }  # fmt: skip
    first = sides[0].name
    if first.startswith("ours"):
        ours = table[first]["tokens_per_second"]
        result["ratios"] = {
            n: ours / row["tokens_per_second"] for n, row in table.items() if n != first
        }
        print("ours to each: " + ", ".join(f"{n} {r:.1f}" for n, r in result["ratios"].items()))
    OUT.with_name(f"{program}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
