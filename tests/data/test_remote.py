"""Object stores, against a real S3 endpoint on loopback: written, read back, damaged, fetched."""

import json
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from overture.config.schema import Config, LoaderConfig, ModelConfig
from overture.data.collate import TokenCollator
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.loaders import build_loader
from overture.data.streams import TokenStream
from overture.data.workspace import Workspace
from overture.errors import ConfigError


@pytest.fixture
def asked():
    """How often each key of the bucket was read."""
    return Counter()


@pytest.fixture
def bucket(monkeypatch, asked):
    """An empty bucket of a server of our own, which Streaming finds through the environment."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    answer = server._server.app

    def count(environ, start_response):
        if environ["REQUEST_METHOD"] == "GET":
            asked[environ["PATH_INFO"].removeprefix("/data/")] += 1
        return answer(environ, start_response)

    server._server.app = count
    host, port = server.get_host_and_port()
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="data")
    yield client
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", b""))
    server.stop()


@pytest.fixture
def job(tmp_path, smoke, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    return Conversion(
        origins={"train": Origin("embedded")},
        task="instruct",
        out_root="s3://data/corpus",
        tokenizer=str(smoke / "tokenizer"),
        max_rows=300,
        max_seq_len=128,
        size_limit=20_000,
    )


def keys(bucket) -> list[str]:
    return [entry["Key"] for entry in bucket.list_objects_v2(Bucket="data").get("Contents", [])]


def test_there_and_back(bucket, job, tmp_path):
    ledger = convert(job, lambda _: None)["train"]
    local = convert(
        Conversion(**{**vars(job), "out_root": str(tmp_path / "local")}), lambda _: None
    )["train"]
    assert local == ledger
    assert "corpus/train/dataset.json" in keys(bucket)
    assert len(keys(bucket)) == len(ledger["files"]) + 1 > 4
    assert list((tmp_path / "tmp").iterdir()) == []
    one, other = (
        TokenStream(local=str(place), remote=remote, split="train", batch_size=1)
        for place, remote in ((tmp_path / "cache", job.out_root), (tmp_path / "local", None))
    )
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine["input_ids"], theirs["input_ids"])
    with pytest.raises(ConfigError, match="s3://data/corpus/train is there already"):
        convert(job, lambda _: None)


def test_two_conversions_to_one_place_of_a_store(job):
    refused = pytest.raises(ConfigError, match="another conversion is writing there")
    with Workspace(job) as work:
        (work.folder / "train").mkdir()
        with refused:
            Workspace(job)
        assert (work.folder / "train").is_dir()


def test_a_store_that_refuses_keeps_the_split_for_resume(bucket, job, tmp_path):
    lost = Conversion(**{**vars(job), "out_root": "s3://missing/corpus"})
    with pytest.raises(ConfigError, match=r"cannot be written to .* give --resume to upload it"):
        convert(lost, lambda _: None)
    (home,) = (tmp_path / "tmp").iterdir()
    written = (home / "train" / "dataset.json").stat().st_mtime_ns
    bucket.create_bucket(Bucket="missing")
    convert(Conversion(**{**vars(lost), "resume": True}), lambda _: None)
    names = [e["Key"] for e in bucket.list_objects_v2(Bucket="missing")["Contents"]]
    assert "corpus/train/index.json" in names
    assert not home.exists() and written


def test_loader_reads_from_the_store(bucket, job, tmp_path):
    ledger = convert(job, lambda _: None)["train"]
    config = Config("instruct", ModelConfig("none"), 128, "1ep", 4)
    config.data_local, config.data_remote = str(tmp_path / "cache"), job.out_root
    spec = build_loader(config, LoaderConfig(), TokenCollator(128, 0), batch_size=4)
    tokens = sum(sum(batch["num_tokens"]) for batch in spec.dataloader)
    assert tokens == ledger["tokens"]["total"]
    assert Path(tmp_path / "cache" / "train").is_dir()
    assert json.loads((tmp_path / "cache" / "train" / "index.json").read_text())["shards"]


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_of_a_node_fetch_a_shard_once(bucket, asked, job, run_door, tmp_path):
    small = {**vars(job), "test_fraction": 0.2, "size_limit": 5_000}
    convert(Conversion(**small), lambda _: None)
    shards = [key for key in keys(bucket) if "train/shard" in key]
    assert len(shards) > 3
    done = run_door(
        "-n", 2, "finetune.py", "yamls/smoke/finetune.yaml", "data_remote=s3://data/corpus",
        f"data_local={tmp_path}/cache", f"run_folder={tmp_path}/run", "max_duration=2ep",
        "eval_interval=1ep", "device_train_microbatch_size=4",
        launcher=str(Path(sys.executable).parent / "composer"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert {key: asked[key] for key in shards} == dict.fromkeys(shards, 1)
