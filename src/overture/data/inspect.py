"""What a converted split holds, as the model will meet it: counts, ids, labels, learned text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overture.data.collate import TokenCollator
from overture.data.schema import read_ledger
from overture.errors import ConfigError

_BOLD, _DIM, _PLAIN = "\033[1;32m", "\033[2m", "\033[0m"


def ledger_lines(folder: Path) -> list[str]:
    """Return the figures of a split's ledger as lines."""
    ledger = read_ledger(folder)
    rows, tokens, packing = ledger["rows"], ledger["tokens"], ledger["packing"]
    dropped = ", ".join(f"{count:,} {why}" for why, count in rows["dropped"].items()) or "none"
    trained = tokens["trained"] / tokens["total"]
    name, pieces = ledger["tokenizer"]["name"], ledger["tokenizer"]["vocab_size"]
    return [
        f"source       {ledger['source']['name']} ({rows['read']:,} rows)",
        f"task         {ledger['task']}, template {ledger['prompt_template']}",
        f"tokenizer    {name} ({pieces:,} pieces)",
        f"rows         {rows['in_split']:,} in this split, {rows['kept']:,} kept; "
        f"dropped: {dropped}",
        f"prompts cut  {rows['truncated']:,}",
        f"documents    {ledger['documents']:,} in {ledger['samples']:,} samples",
        f"tokens       {tokens['total']:,}, {tokens['trained']:,} learned ({trained:.1%})",
        f"packing      {packing['method']}, {packing['utilisation']:.1%} of "
        f"{ledger['max_seq_len']} tokens used",
    ]


def sample_lines(
    folder: Path, dataset: Any, tokenizer: Any, numbers: Sequence[int], colour: bool
) -> Iterator[str]:
    """Yield lines on chosen samples, one block per document.

    Args:
        folder: the split.
        dataset: the split opened for reading, giving rows of `data/schema.py` by number.
        tokenizer: the one that the split was converted with.
        numbers: which samples.
        colour: learned text in green, prompts dimmed; otherwise learned text stands in [[ ]].
    """
    max_seq_len = read_ledger(folder)["max_seq_len"]
    # Through the real collator: what is shown is what the model is trained on.
    collate = TokenCollator(max_seq_len, tokenizer.pad_token_id)
    for number in numbers:
        if not 0 <= number < dataset.num_samples:
            raise ConfigError(
                f"--sample {number}: {folder} holds samples 0 to {dataset.num_samples - 1}"
            )
        row = dataset[number]
        labels = collate([row])["labels"][0].numpy()
        starts = np.concatenate([[0], row["document_ends"][:-1]]).astype(int)
        yield f"sample {number}: {len(starts)} documents, {len(row['input_ids'])} tokens"
        for index, (start, end) in enumerate(
            zip(starts, row["document_ends"].astype(int), strict=True)
        ):
            ids, own = row["input_ids"][start:end], labels[start:end]
            masked = int((own == -100).sum())
            yield f" document {index}: {end - start} tokens, {masked} masked (-100)"
            yield f"  ids     {' '.join(map(str, ids.tolist()))}"
            yield f"  labels  {' '.join(map(str, own.tolist()))}"
            yield from ("  " + line for line in _text(tokenizer, ids, own != -100, colour))


def _text(tokenizer: Any, ids: np.ndarray, learned: np.ndarray, colour: bool) -> list[str]:
    """Return the decoded text, runs of learned and of given tokens told apart."""
    opening, closing = (_BOLD, _PLAIN) if colour else ("[[", "]]")
    dim, plain = (_DIM, _PLAIN) if colour else ("", "")
    borders = np.flatnonzero(np.diff(learned.astype(np.int8))) + 1
    text = ""
    for part, is_learned in zip(np.split(ids, borders), np.split(learned, borders), strict=True):
        words = tokenizer.decode(part)
        text += f"{opening}{words}{closing}" if is_learned[0] else f"{dim}{words}{plain}"
    return text.splitlines()
