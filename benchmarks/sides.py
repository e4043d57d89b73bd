"""The sides of the throughput benchmarks: a process that trains, and says what each window held.

    python benchmarks/sides.py SIDE BATCH FOLDER

Started by turns.py, which writes FOLDER/plan.json (`length`, and `sides` by name), the weights, the
tokenizer and the documents. A side has the keys
    library     ours, hf (transformers' Trainer) or trl (SFTTrainer)
    dtype       of the weights
    data        folder of the shards; default: data, documents packed into rows
    all         train all weights instead of LoRA r=16 on all linear layers
    fixed       hf: pad every batch to the same length; packing: trl packs; autocast: hf in bfloat16
    precision, attention, compile   keys of our config
    switch      ours, with something else in the place of one of its parts
    liger       trl with Liger's kernels
    by_length   batches of documents of about the same length
Where the plan says `alone`, a side waits for the word also before its warm-up.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
WARM_UP_SECONDS, WINDOW_SECONDS = 15.0, 8.0
GPU_SECONDS, GPU_STEPS = 3.0, 8  # of a window, and the fewest in a warm-up


class Windows:
    """Counts tokens step by step, and after each window waits for the word to go on."""

    def __init__(self, imported: float) -> None:
        import torch

        self.on_gpu = torch.cuda.is_available()
        self.imported, self.window = imported, GPU_SECONDS if self.on_gpu else WARM_UP_SECONDS
        self.fewest = GPU_STEPS if self.on_gpu else 1
        self.tokens = self.labels = self.steps = 0
        self.start = time.perf_counter()

    def count(self, tokens: int, labels: int) -> None:
        """Add a batch."""
        self.tokens, self.labels = self.tokens + tokens, self.labels + labels

    def step(self) -> None:
        """End a step."""
        self.steps += 1
        if self.on_gpu and self.steps % 4:  # it is only queued until it is waited for
            return
        wait_for_device()
        seconds = time.perf_counter() - self.start
        if seconds < self.window or self.steps < self.fewest:
            return
        seconds = time.perf_counter() - self.start
        record = {"seconds": seconds, "tokens": self.tokens, "labels": self.labels,
                  "steps": self.steps, "peak_mib": peak_mib() - self.imported}  # fmt: skip
        print("WINDOW " + json.dumps(record), flush=True)
        if not sys.stdin.readline().strip():
            os._exit(0)
        self.window, self.fewest = GPU_SECONDS if self.on_gpu else WINDOW_SECONDS, 1
        self.tokens = self.labels = self.steps = 0
        self.start = time.perf_counter()


def wait_for_device() -> None:
    """Wait until a GPU, if there is one, has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib() -> float:
    """Return the most memory so far: of a GPU if there is one, else the resident size."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
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


def run_ours(folder: Path, length: int, batch: int, side: dict[str, Any], imported: float) -> None:
    """Train by the recipe itself."""
    from composer.core import Callback

    from overture.training import run

    windows = Windows(imported)

    class Report(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            windows.count(sum(state.batch["num_tokens"]), sum(state.batch["num_labels"]))
            windows.step()

    run.build_callbacks = lambda config: [Report()]
    switch_off(side.get("switch"))
    run.train(ours_config(folder, length, batch, side, "1000ep"), "benchmark")


def ours_config(folder: Path, length: int, batch: int, side: dict[str, Any], duration: str) -> Any:
    """Return the config of a side of ours."""
    from overture.config.load import load_config

    text = {
        "run_name": f"benchmark-{os.getpid()}", "max_seq_len": length,
        "task": "causal_lm" if side.get("all") else "instruct",
        "data_local": str(folder / side.get("data", "data")),
        "tokenizer_name": str(folder / "gpt2"),
        "model": {"name": str(folder / "model"), "dtype": side["dtype"],
                  "attention": side.get("attention", "auto")},
        "trainable": "all" if side.get("all") else "lora",
        "precision": side.get("precision", "fp32"), "compile": side.get("compile", False),
        "train_loader": {"dataset": {"split": "train", "shuffle": True}, "drop_last": True},
        "scheduler": {"name": "constant_with_warmup"}, "max_duration": duration,
        "save_interval": "1000ep", "global_train_batch_size": batch,
        "device_train_microbatch_size": batch, "progress_bar": False,
        "run_folder": str(folder / f"run-{os.getpid()}"),
    }  # fmt: skip
    path = folder / f"ours-{os.getpid()}.yaml"
    path.write_text(json.dumps(text))
    return load_config([str(path)], (text["task"],))


def switch_off(what: str | None) -> None:
    """Put what most would write in place of one of our parts."""
    import torch

    from overture.data.collate import TokenCollator
    from overture.models import causal_lm, lora
    from overture.models.loss import label_positions
    from overture.training import cores

    collated = TokenCollator.__call__

    def by_the_longest(self: Any, rows: Any) -> Any:
        return collated(TokenCollator(max(len(r["input_ids"]) for r in rows), 0), rows)

    def all_logits(
        hidden: Any, head: Any, targets: Any, scale: float, softcap: Any, count: int, *_: Any
    ) -> tuple[Any, Any]:
        logits = head(hidden[:count]).float()
        losses = torch.nn.functional.cross_entropy(logits, targets[:count], reduction="none")
        return losses.sum(), losses.detach()

    def liger(
        hidden: Any, head: Any, targets: Any, scale: float, softcap: Any, count: int, *_: Any
    ) -> tuple[Any, Any]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        total = loss(head.weight, hidden[:count], targets[:count])
        return total, total.detach().expand(count) / max(count, 1)

    if what == "loss":
        causal_lm.cross_entropy_at = all_logits
    if what == "liger":
        causal_lm.cross_entropy_at = liger
    if what == "labels":  # logits and their gradients at every token, a chunk at a time
        causal_lm.label_positions = lambda labels, _, *ahead: label_positions(
            labels, labels.numel(), *ahead
        )
    if what == "length":
        TokenCollator.__call__ = by_the_longest
    if what == "memory":
        cores._keep_memory = lambda: "the system's allocator as it is"
    if what == "lora":
        from peft.tuners.lora import Linear

        lora._layer_class = lambda: Linear


def run_peer(folder: Path, length: int, batch: int, side: dict[str, Any], imported: float) -> None:
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

    gpu = torch.cuda.is_available()
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
        "output_dir": str(folder / "peer"), "per_device_train_batch_size": batch,
        "use_cpu": not gpu, "max_steps": 10**6, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10**6, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "learning_rate": 1e-4, "torch_compile": side.get("compile", False),
        "group_by_length": side.get("by_length", False),
    }  # fmt: skip
    if side["library"] == "hf":
        model = model if side.get("all") else get_peft_model(model, lora)
        pad = {"padding": "max_length", "max_length": length} if side.get("fixed") else {}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**common, bf16=side.get("autocast", False)),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, **pad),
            callbacks=[Report()],
        )
        if side.get("fixed"):
            trainer.data_collator = FixedLength(tokenizer.pad_token_id, length)
    else:
        from trl import SFTConfig, SFTTrainer

        for row in rows:
            row["completion_mask"] = [int(label != -100) for label in row.pop("labels")]
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **common, bf16=False, packing=side.get("packing", False), max_length=length,
                completion_only_loss=True, use_liger_kernel=side.get("liger", False),
                gradient_checkpointing=False,  # on by default, which costs a third of the speed
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

    def __init__(self, pad: int, length: int) -> None:
        self.pad, self.length = pad, length

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        import torch

        def filled(name: str, value: int) -> Any:
            return torch.tensor([r[name] + [value] * (self.length - len(r[name])) for r in rows])

        mask = [[1] * len(r["input_ids"]) + [0] * (self.length - len(r["input_ids"])) for r in rows]
        return {
            "input_ids": filled("input_ids", self.pad),
            "labels": filled("labels", -100),
            "attention_mask": torch.tensor(mask),
        }


def main() -> None:
    """Be one side; its imports are no part of its memory."""
    name, batch, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    import composer  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import streaming  # noqa: F401
    import transformers  # noqa: F401

    plan = json.loads((folder / "plan.json").read_text())
    side = plan["sides"][name]
    if side["library"] == "trl":
        import trl  # noqa: F401
    if plan.get("alone") and not sys.stdin.readline().strip():
        return
    run = run_ours if side["library"] == "ours" else run_peer
    run(folder, plan["length"], batch, side, peak_mib())


if __name__ == "__main__":
    main()
