"""What a run folder says, read back."""

import json
from pathlib import Path

import torch

from overture.checkpoint import STATE


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


def final_state(folder: Path) -> dict:
    """What the newest checkpoint of a run holds."""
    newest = max((folder / "checkpoints").glob("ba*"), key=lambda path: int(path.name[2:]))
    return torch.load(newest / STATE, weights_only=False)["state"]


def assert_same(one: Path, other: Path) -> None:
    """Losses, weights, state of the optimizer and exported files of two runs, bit for bit."""
    assert curve(one) == curve(other)
    states = [final_state(folder) for folder in (one, other)]
    for part in ("model", "optimizers"):
        flat = [dict(leaves(state[part])) for state in states]
        assert flat[0].keys() == flat[1].keys()
        assert len(flat[0]) > 10
        for name, value in flat[0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(flat[1][name])), name
    names = [path.name for path in (one / "hf").iterdir()]
    weights = next(name for name in names if name.endswith(".safetensors"))
    assert (one / "hf" / weights).read_bytes() == (other / "hf" / weights).read_bytes()


def leaves(tree, path=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}/{number}")
    elif isinstance(tree, torch.Tensor | int | float):
        yield path, tree
