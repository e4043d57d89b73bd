"""Best-fit packing: nothing lost, nothing doubled, nothing over the edge, little left empty."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overture.data.packing import best_fit


@given(st.integers(1, 64).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_every_document_is_in_exactly_one_row_that_holds_it(case):
    capacity, lengths = case
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_no_two_rows_could_be_one(lengths):
    # Best fit opens a row only when no other has room, so at most one is half empty or less.
    rows = best_fit(lengths, 32)
    assert sum(sum(lengths[i] for i in row) <= 16 for row in rows) <= 1


def test_order_is_kept_between_and_within_rows():
    rows = best_fit([5, 5, 3, 2, 5], 10)
    assert rows == sorted(rows)
    assert all(row == sorted(row) for row in rows)


def test_text_like_lengths_fill_rows():
    rng = random.Random(0)
    lengths = [min(2048, 1 + int(rng.expovariate(1 / 180))) for _ in range(10_000)]
    rows = best_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.98


@pytest.mark.parametrize("lengths", [[0], [9], [4, 9]])
def test_documents_that_cannot_be_packed_are_refused(lengths):
    with pytest.raises(ValueError, match="within 1 and 8"):
        best_fit(lengths, 8)


def test_nothing_gives_nothing():
    assert best_fit([], 8) == []
