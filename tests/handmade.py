"""Splits written by hand: what a conversion of some task writes, without the conversion."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from overture.data.schema import seal, unseal

IDS, BYTES, ENDS = "ndarray:uint16", "ndarray:uint8", "ndarray:uint32"
COLUMNS = {
    "instruct": {"input_ids": IDS, "loss_mask": BYTES, "document_ends": ENDS},
    "chat": {"input_ids": IDS, "loss_mask": BYTES, "document_ends": ENDS},
    "seq2seq": {"input_ids": IDS, "labels": IDS},
    "classify": {"input_ids": IDS, "token_type_ids": BYTES, "label": "int32"},
    "text": {"text": "str"},
}


def pack(*documents: tuple[list[int], list[int]]) -> dict[str, np.ndarray]:
    """Return a row of documents, each (prompt, response)."""
    parts = [(ids, [learned] * len(ids)) for d in documents for learned, ids in enumerate(d)]
    return {
        "input_ids": np.array([i for ids, _ in parts for i in ids], np.uint16),
        "loss_mask": np.array([m for _, mask in parts for m in mask], np.uint8),
        "document_ends": np.cumsum([len(p) + len(r) for p, r in documents], dtype=np.uint32),
    }


def write(
    folder: Path,
    task: str,
    rows: list[dict[str, Any]],
    tokenizer: str,
    columns: dict[str, str] | None = None,
    compression: str | None = None,
    size_limit: int = 1 << 20,
    **ledger: Any,
) -> Path:
    """Write rows as a split with its ledger, in which `ledger` replaces entries; returns it."""
    columns = columns or COLUMNS[task]
    folder.parent.mkdir(parents=True, exist_ok=True)
    writer = MDSWriter(
        out=str(folder), columns=columns, compression=compression,
        hashes=["sha256", "xxh64"], size_limit=size_limit,
    )  # fmt: skip
    for row in rows:
        writer.write(row)
    writer.finish()
    documents = sum(len(row.get("document_ends", [0])) for row in rows)
    total = sum(len(row.get(name, ())) for row in rows for name in ("input_ids", "labels"))
    trained = sum(int(np.sum(row.get("loss_mask", 0))) + len(row.get("labels", ())) for row in rows)
    packed = "loss_mask" in columns
    content = {
        "task": task,
        "source": {"name": "by hand"},
        "prompt_template": None,
        "rows": {
            "read": documents, "in_split": documents, "kept": documents, "malformed": {},
            "dropped": {}, "truncated": 0, "split": 0, "duplicates": 0,
        },
        "documents": documents,
        "samples": len(rows),
        "tokens": {"total": total, "trained": trained},
        "packing": {
            "method": "best_fit" if packed else "none",
            "utilisation": total / (len(rows) * 64) if packed else 1.0,
        },
        "max_seq_len": 64,
        "labels": ["no", "yes"] if columns.get("label") == "int32" else None,
        "tokenizer": None
        if task == "text"
        else {"name": tokenizer, "vocab_size": 1024, "eos_token_id": 0},
        "columns": columns,
    }  # fmt: skip
    (folder / "dataset.json").write_text(seal({**content, **ledger}))
    sign(folder)
    return folder


def sign(folder: Path, **changes: Any) -> None:
    """Make the ledger's list of files true again, and change entries of the ledger."""
    ledger = unseal(folder / "dataset.json") | changes
    ledger["files"] = [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
        if path.name != "dataset.json"
    ]
    (folder / "dataset.json").write_text(seal(ledger))


def talk(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, *messages]}


def pair(i, **changes):
    return {"instruction": f"say {i}", "response": f"cat {i}", **changes}
