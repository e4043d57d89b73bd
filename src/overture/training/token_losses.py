"""Which tokens of held-out samples a model still gets wrong: a loss for each, to be seen."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from overture.callbacks.run_log import finite
from overture.data.inspect import pieces
from overture.data.schema import write_aside

ROWS, TOKENS = 64, 2**16  # that are looked at, at most
CHOSEN, LONGEST = 8, 400  # samples that are kept, and tokens of each
Sample = tuple[list[int], list[float | None]]  # ids, and the loss of each, None if not learned


@torch.no_grad()
def write_token_losses(
    path: Path, model: Any, rows: Any, collate: Callable[[list], dict], tokenizer: Any
) -> None:
    """Write the samples of the highest mean loss among the first rows of a split, one per line:
    `mean` in nats per label, `of` how many, and `pieces`, each a text and its loss or null.

    The `model` is as Composer's Trainer takes it; each document of a row of the dataset `rows` is
    a sample; `collate` makes a batch of rows, as for evaluation.
    """
    device, seen = next(model.parameters()).device, 0
    model.eval()
    found: list[Sample] = []
    shown = {"desc": "losses of tokens", "unit": " rows", "delay": 2, "leave": False}
    for number in tqdm(range(min(ROWS, rows.num_samples)), **shown):
        batch = collate([rows[number]])
        seen += batch["input_ids"].numel()
        if found and seen > TOKENS:
            break
        if sum(batch["num_labels"]):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            found += _documents(batch, model(batch)["token_losses"].float().tolist())
    found.sort(key=_mean, reverse=True)
    lines = []
    for sample in found[:CHOSEN]:
        row = {"mean": finite(_mean(sample)), "of": len(found)}
        row["pieces"] = list(_merged(tokenizer, *_worst_stretch(*sample)))
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_aside(path, "".join(lines))


def _documents(batch: dict[str, Any], losses: list[float]) -> Iterator[Sample]:
    """Yield the documents of a batch of one row that have a label, to the last of these."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    known = iter(losses)
    each = [None if label == -100 else next(known) for label in labels]
    if "document_starts" not in batch:  # a pair: what the decoder makes stands behind the source
        source = ids[: int(batch["attention_mask"][0].sum())]
        target = labels[: len(losses)]
        yield source + target, [None] * len(source) + each[: len(target)]
        return
    # Of a masked token its label is what stood there.
    ids = [i if label == -100 else label for i, label in zip(ids, labels, strict=True)]
    starts = batch["document_starts"][0].tolist()
    for start, group in itertools.groupby(enumerate(starts), key=lambda one: one[1]):
        places = [n for n, _ in group if each[n] is not None]
        if start >= 0 and places:
            yield ids[start : places[-1] + 1], each[start : places[-1] + 1]


def _mean(sample: Sample) -> float:
    known = [loss for loss in sample[1] if loss is not None]
    mean = sum(known) / len(known)
    return mean if math.isfinite(mean) else math.inf


def _worst_stretch(ids: list[int], each: list[float | None]) -> Sample:
    """Return the stretch of a long sample in which the losses sum up to most."""
    if len(ids) <= LONGEST:
        return ids, each
    sums = [0.0, *itertools.accumulate(0.0 if loss is None else loss for loss in each)]
    begins = range(len(ids) - LONGEST + 1)
    begin = max(begins, key=lambda n: sums[n + LONGEST] - sums[n])
    return ids[begin : begin + LONGEST], each[begin : begin + LONGEST]


def _merged(
    tokenizer: Any, ids: list[int], each: list[float | None]
) -> Iterator[tuple[str, float | None]]:
    """Yield texts and their losses: tokens that share a character as one."""
    texts = pieces(tokenizer, ids)
    begins = [n for n, text in enumerate(texts) if text or not n]
    for begin, end in itertools.pairwise([*begins, len(texts)]):
        known = [loss for loss in each[begin:end] if loss is not None]
        total = sum(known)
        yield texts[begin], (total if total < 1e9 else 1e9) if known else None  # JSON has no NaN
