"""Conversion by Spark's workers gives the rows, the order and the ledger of the local engine."""

import pickle
import shutil
import sys

import numpy as np
import pytest

import convert_dataset
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.encode import Tokens
from overture.data.shards import Split
from overture.data.verify import verify
from overture.errors import ConfigError
from overture.tokenizer import load_tokenizer


@pytest.fixture
def spark():
    pytest.importorskip("pyspark", reason="requirements-spark.txt is not installed")
    if not shutil.which("java"):
        pytest.skip("Spark needs Java, which is not here")


def test_without_spark_it_is_said(tmp_path, smoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    command = ["convert_dataset", "--dataset", "embedded", "--max_rows", "20", "--task", "instruct",
               "--tokenizer", smoke / "tokenizer", "--out_root", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--engine", "spark"])
    with pytest.raises(
        ConfigError, match="pyspark is not installed; pip install -r requirements-s"
    ):
        convert_dataset.main()
    assert not (tmp_path / "out").exists()
    options = {"packing": "concat", "tokenizer": "t", "engine": "spark"}
    with pytest.raises(ConfigError, match="--concat_tokens goes on from row to row"):
        Conversion({"train": Origin("embedded")}, "text", "out", **options).check()


@pytest.mark.parametrize("specials", [False, True])
def test_a_tokenizer_that_was_sent_is_the_same(smoke, specials):
    tokens = Tokens(load_tokenizer(str(smoke / "tokenizer")), specials)
    again = pickle.loads(pickle.dumps(tokens))
    texts = ["a plain one", f"one with {tokens.tokenizer.eos_token} in it"]
    ours, theirs = (one.ids(texts) for one in (tokens, again))
    assert all(map(np.array_equal, ours, theirs))
    assert (tokens.eos in ours[1]) == specials


@pytest.mark.slow
@pytest.mark.data
def test_dolly_by_two_workers(spark, smoke, real_data, tmp_path):
    (dolly,) = real_data.glob("dolly/*.jsonl")
    options = {"tokenizer": str(smoke / "tokenizer"), "max_seq_len": 512}
    options |= {"test_fraction": 0.1, "stratify": "category", "overflow": "drop"}
    more = {"size_limit": 1 << 20, "compression": "zstd"}
    for engine, processes in (("local", 1), ("spark", 2)):
        out = str(tmp_path / engine)
        job = Conversion({"train": Origin(str(dolly))}, "instruct", out, engine=engine,
                         processes=processes, **options, **more)  # fmt: skip
        convert(job, lambda _: None)
        assert sorted(p.name for p in (tmp_path / engine).iterdir()) == ["test", "train"]
    for split in ("train", "test"):
        ours, theirs = (Split(tmp_path / engine / split) for engine in ("local", "spark"))
        assert len(ours) == len(theirs) > 0
        for number in range(len(ours)):
            one, other = ours.row(number), theirs.row(number)
            assert all(np.array_equal(one[name], other[name]) for name in one), number
        facts = ({k: v for k, v in s.ledger.items() if k != "files"} for s in (ours, theirs))
        assert next(facts) == next(facts)
        rejected = [split.folder / "rejected.jsonl" for split in (ours, theirs)]
        assert rejected[0].read_bytes() == rejected[1].read_bytes()
        verify(theirs, lambda _: None)
    assert len(Split(tmp_path / "spark" / "train").readers) > 2
