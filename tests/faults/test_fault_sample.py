"""Faults that no other test injects into a real run, one of each; `make faults` tries all kinds."""

import random

import pytest

from faults import content, damage, kills, storage
from faults.bench import ANSWER, Bench

SAMPLE = [
    kills.converting, kills.saving, damage.shard, damage.index, damage.ledger, damage.missing,
    storage.full_disk_converting, storage.full_disk_saving, storage.error_500,
    content.hostile_index, content.hostile_model,
    pytest.param(storage.one_cache, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.fixture(scope="module")
def bench(smoke, tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"), random.Random(3), steps=20)


@pytest.mark.parametrize("kind", SAMPLE, ids=lambda kind: kind.__name__)
def test_fault(kind, bench):
    if kind.__name__.startswith("full_disk") and not storage.may_mount():
        pytest.skip("this user may not mount a small disk")
    (outcome,) = kind(bench, 1)
    assert outcome.detected, outcome.note
    assert outcome.recovered is not False, outcome.note
    assert outcome.seconds < ANSWER
