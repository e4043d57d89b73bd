"""What a run folder says, read back."""

import json
from pathlib import Path


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def curve(folder: Path) -> dict[tuple[str, int], float]:
    """The loss of each step and evaluation; of a step that was done twice, the last."""
    found = {}
    for kind in ("train", "eval"):
        for record in records(folder, kind):
            found[kind, record["step"]] = record.get("loss", record.get("cross_entropy"))
    return found
