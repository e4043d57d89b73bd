"""Checkpoints are whole or set aside, here and in a store, and not lost to a full disk."""

import errno
import fcntl
import math
import os
import resource
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer import Callback
from composer.core import Timestamp
from moto.server import ThreadedMotoServer

from outages import RESUMED
from overture import export
from overture.callbacks.early_stop import EarlyStop
from overture.checkpoint import (
    MANIFEST,
    PATIENCE,
    STATE,
    RemoteFolder,
    change_manifest,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from overture.config.schema import Config
from overture.errors import ConfigError, DataError, GuardError
from overture.training import run as recipe
from overture.training import run_folder
from overture.training.resume import check_room, checkpoint_bytes
from runs import assert_same, curve, records, result


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "missing", "empty"])
def test_broken_checkpoint_is_set_aside_and_an_earlier_one_is_used(broken, damage, capsys):
    def between(folder: Path) -> None:
        newest = folder / "checkpoints" / "ba4"
        state = newest / STATE
        if damage == "flip":
            content = bytearray(state.read_bytes())
            content[len(content) // 2] ^= 4
            state.write_bytes(content)
        elif damage == "cut":
            state.write_bytes(state.read_bytes()[:-7])
        elif damage == "manifest":
            (newest / MANIFEST).write_text("{")
        elif damage == "missing":
            state.unlink()
        else:
            shutil.rmtree(newest)
            newest.mkdir()
        # What a kill leaves while a checkpoint is written.
        (folder / "checkpoints" / ".ba5.123").mkdir()
        (folder / "checkpoints" / ".ba5.123" / STATE).write_bytes(b"half")

    options = ("max_duration=7ba", "eval_interval=7ba", "save_interval=2ba")
    whole = broken("whole", *options)
    parts = broken("parts", *options, at=(5,), between=between)
    assert_same(whole, parts)
    said = capsys.readouterr().out
    assert "ba4" in said
    assert "set aside as broken-ba4-0; going back to an earlier checkpoint" in said
    assert "going on from runs/parts/checkpoints/ba2" in said
    broken_off, resumed = records(parts, "event")
    assert broken_off["step"] == resumed["step"] == 2
    assert broken_off["what"].endswith("set aside as broken-ba4-0")
    assert resumed["what"] == "resumed"
    assert "step 2: resumed" in (parts / "report.html").read_text()
    assert (parts / "checkpoints" / "broken-ba4-0").is_dir()
    assert not list((parts / "checkpoints").glob(".ba*"))


def test_none_whole_is_no_new_beginning(broken, run):
    options = ("max_duration=4ba", "save_interval=2ba", "eval_interval=4ba")

    def spoil(folder: Path) -> None:
        (folder / "checkpoints" / "ba2" / STATE).write_bytes(b"x")

    broken("lost", *options, at=(3,), between=spoil, finish=False)
    steps = len(records(Path("runs/lost"), "train"))
    for _ in range(2):  # the second finds it set aside already
        with pytest.raises(DataError, match=r"no checkpoint there is whole .*broken-ba2-0.*delete"):
            run(*RESUMED, *options, "run_name=lost")
        assert len(records(Path("runs/lost"), "train")) == steps
    # A kill between two renames, and a disk that fails, which says nothing of a checkpoint.
    checkpoints = Path("runs/lost/checkpoints")
    broken("whole", *options)
    shutil.rmtree(checkpoints)
    shutil.copytree("runs/whole/checkpoints", checkpoints)
    (checkpoints / "ba4").rename(checkpoints / ".old-ba4")
    assert newest_checkpoint(checkpoints)[0].name == "ba4"
    (checkpoints / "ba4" / STATE).unlink()
    (checkpoints / "ba4" / MANIFEST).unlink()
    (checkpoints / "ba4" / MANIFEST).mkdir()
    with pytest.raises(GuardError, match=r"ba4: cannot be read .*may well be whole"):
        newest_checkpoint(checkpoints)
    assert not list(checkpoints.glob("broken-*"))


def test_as_many_are_kept_as_was_asked(broken):
    folder = broken("kept", "max_duration=5ba", "save_interval=1ba")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["ba4", "ba5"]


def test_checkpoints_of_others_need_a_word(run, tmp_path, capsys):
    _, first = run("run_name=first", "max_duration=1ba", "eval_first=false")
    foreign = tmp_path / "foreign.pt"
    shutil.copy(first / "checkpoints" / "ba1" / STATE, foreign)
    options = ("run_name=second", "load_weights_only=true", "max_duration=1ba")
    with pytest.raises(ConfigError, match=r"pickle.*load_unverified=true"):
        run(*options, f"load_path={foreign}")
    with pytest.raises(ConfigError, match=r"load_path: nowhere: no checkpoint is there"):
        run(*options, "load_path=nowhere")
    archive = tmp_path / "foreign.tar.gz"
    archive.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"foreign.tar.gz: is an archive"):
        run(*options, f"load_path={archive}", "load_unverified=true")
    capsys.readouterr()
    code, second = run(*options, f"load_path={foreign}", "load_unverified=true")
    assert code == 0
    assert "is loaded unverified: a pickle" in capsys.readouterr().out
    start = result(first)["eval_cross_entropy"]
    assert result(second)["eval_cross_entropy_before"] == pytest.approx(start, abs=1e-5)
    state = first / "checkpoints" / "ba1" / STATE
    state.write_bytes(state.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"state\.pt: .* bytes, but .* were written"):
        run("run_name=third", "load_weights_only=true", f"load_path={state}")


def test_full_disk_leaves_the_last_checkpoint_and_one_sentence(broken, monkeypatch):
    save = torch.save

    def full(content, path, **options):
        if "ba4" in str(path):
            Path(path).write_bytes(b"part")
            raise OSError(28, "No space left on device")
        save(content, path, **options)

    monkeypatch.setattr(torch, "save", full)
    options = ("max_duration=6ba", "save_interval=2ba", "eval_interval=6ba")
    with pytest.raises(GuardError, match=r"step 4: the checkpoint cannot be written .*No space"):
        broken("full", *options)
    folder = Path("runs/full")
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["ba2"]
    assert result(folder)["status"] == "failed"
    monkeypatch.setattr(torch, "save", save)
    assert_same(broken("whole", *options), broken("full", *options))


@pytest.mark.parametrize(
    ("owner", "said"),
    [(export, r"runs/full/hf: cannot be written"), (EarlyStop, r"cannot be written to \(File too")],
)
def test_a_disk_that_is_full_for_weights_leaves_no_part_of_them(owner, said, run, monkeypatch):
    write, kinds = owner._write, (signal.SIGXFSZ, resource.RLIMIT_FSIZE)
    old = resource.getrlimit(kinds[1])

    def limited(*arguments):
        handler = signal.signal(kinds[0], signal.SIG_IGN)
        resource.setrlimit(kinds[1], (2_000, old[1]))  # the kernel refuses what is larger
        try:
            return write(*arguments)
        finally:
            resource.setrlimit(kinds[1], old)
            signal.signal(kinds[0], handler)

    monkeypatch.setattr(owner, "_write", limited)
    options = ("run_name=full", "callbacks.early_stop.patience=2")
    with pytest.raises(GuardError, match=said):
        run(*options)
    left = {path.name for path in Path("runs/full").iterdir()}
    assert not left & {"hf", *(["best.safetensors"] if owner is EarlyStop else [])}
    assert not [name for name in left if "partial" in name or ".best" in name]
    monkeypatch.setattr(owner, "_write", write)
    code, folder = run(*options)
    assert (code, result(folder)["status"]) == (0, "completed")
    assert not (folder / "best.safetensors").exists()


def test_too_little_room_is_found_before_training(run, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(GuardError, match=r"save_folder: .*runs/tight/checkpoints: 3 checkpoints"):
        run("run_name=tight")
    assert not Path("runs/tight").exists()


def test_room_for_what_is_saved_and_not_trained(run, monkeypatch):
    options = ("trainable=last_layer", "save_interval=4ba", "save_num_checkpoints_to_keep=1")
    _, folder = run("run_name=first", *options)
    size = (folder / "checkpoints" / "ba8" / STATE).stat().st_size
    usage = shutil.disk_usage(".")
    for share, name in ((1.6, "tight"), (2.4, "wide")):
        free = int(share * size)  # of one that is kept, and one that is being written
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if name == "wide":
            assert run(f"run_name={name}", *options)[0] == 0
            continue
        with pytest.raises(GuardError, match="2 checkpoints take"):
            run(f"run_name={name}", *options)


@pytest.mark.parametrize("where", ["begin_run", "write_result"])
def test_a_disk_that_is_full_at_the_beginning_or_the_end(run, monkeypatch, where):
    def full(*arguments, **options):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(run_folder, where, full)
    with pytest.raises(GuardError, match=r"runs/late: cannot be written to \(Disk quota exceeded"):
        run("run_name=late", "max_duration=2ba")
    monkeypatch.undo()


def test_room_is_asked_for_what_is_not_there_yet(monkeypatch, tmp_path):
    model = torch.nn.Linear(1000, 1000, bias=False)  # a checkpoint takes 12 MB
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=13_000_000))
    config = Config("instruct", None, 2, "1ba", 1, run_folder=str(tmp_path))
    with pytest.raises(GuardError, match="3 checkpoints take"):
        check_room(config, checkpoint_bytes(config, model))
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"ba{step}").mkdir(parents=True)
    check_room(config, checkpoint_bytes(config, model))


def test_save_folder_is_one_run_s_alone(run, tmp_path):
    (tmp_path / "saved").mkdir()
    with (tmp_path / "saved" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"save_folder: another process trains into .*saved"):
            run("run_name=second", f"save_folder={tmp_path}/saved")
    assert not Path("runs/second").exists()
    assert run("run_name=second", f"save_folder={tmp_path}/saved")[0] == 0


def test_a_first_evaluation_without_a_number_is_not_the_best_one(tmp_path):
    log = SimpleNamespace(last_eval=math.nan, scores={})
    stop = EarlyStop(3, 0.0, False, tmp_path / "best", log)
    for step, loss in enumerate((math.nan, math.nan, 3.0, 4.0)):
        log.last_eval = loss
        stop.eval_end(SimpleNamespace(timestamp=Timestamp(batch=step)), None)
    assert (stop.best[:2], stop.waited) == ((2, 3.0), 1)


def test_the_best_evaluation_is_kept_though_its_fall_is_too_small_to_wait_on(tmp_path):
    log, seen = SimpleNamespace(last_eval=0.0, scores={}), []
    stop = EarlyStop(9, 0.01, False, tmp_path / "best", log)
    for step, log.last_eval in enumerate((2.0, 1.995, 1.991, 1.993, 1.98)):
        stop.eval_end(SimpleNamespace(timestamp=Timestamp(batch=step)), None)
        seen.append((stop.best[0], stop.waited))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 3), (4, 0)]


def test_flipped_bit_in_the_best_weights_is_found(run, monkeypatch):
    options = ("run_name=best", "callbacks.early_stop.patience=2", "optimizer.lr=1.0",
               "max_duration=12ba", "eval_interval=2ba")  # fmt: skip
    restore = EarlyStop.restore

    def spoil(self, state):
        content = bytearray(self.path.read_bytes())
        content[-3] ^= 1
        self.path.write_bytes(content)
        return restore(self, state)

    monkeypatch.setattr(EarlyStop, "restore", spoil)
    with pytest.raises(DataError, match=r"best.safetensors: its weights are not what was written"):
        run(*options)


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda n: (events.append(os.fstat(n).st_ino), sync(n))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), events.append(str(b)))[0])
    place = write_checkpoint(tmp_path, 4, lambda f: (f / STATE).write_bytes(b"weights"), {"a": 1})
    number = {path: path.stat().st_ino for path in (place / STATE, place / MANIFEST, place)}
    renamed = events.index(str(place))
    assert {*number.values()} <= {*events[:renamed]}
    assert tmp_path.stat().st_ino in events[renamed:]
    events.clear()
    change_manifest(place, a=2)
    assert read_checkpoint(place)["a"] == 2
    manifest = (place / MANIFEST).stat().st_ino
    assert events == [manifest, str(place / MANIFEST), number[place]]


def test_a_store_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert PATIENCE["read_timeout"] * PATIENCE["retries"]["total_max_attempts"] <= 45
    monkeypatch.setitem(PATIENCE, "read_timeout", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConfigError, match=r"s3://runs/a: cannot be read .*[Tt]ime"):
            RemoteFolder("s3://runs/a").fetch_newest(tmp_path)
        (tmp_path / STATE).write_bytes(b"weights")
        with pytest.raises(GuardError, match=r"s3://runs/a: cannot be written"):
            RemoteFolder("s3://runs/a").upload_file(tmp_path / STATE)
        server.settimeout(0)
        asked = []
        with suppress(BlockingIOError):
            while True:
                asked.append(server.accept())
    assert len(asked) == 6  # three times each


def test_object_store_holds_what_a_fresh_machine_needs(broken, run, monkeypatch, tmp_path):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        import boto3

        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="runs")
        options = ("max_duration=7ba", "eval_interval=7ba", "save_interval=2ba")
        whole = broken("whole", *options)

        def between(folder: Path) -> None:
            shutil.rmtree(folder)  # the machine is gone
            body = b"not what was stored"
            client.put_object(Bucket="runs", Key="there/parts/ba4/state.pt", Body=body)

        def forbidden(*_: object) -> None:
            raise FileNotFoundError("403")  # as Composer's client has it

        def spoil(folder: Path) -> None:
            (folder / "checkpoints" / "ba4" / STATE).write_bytes(b"x")

        parts = broken("parts", *options, "save_folder=s3://runs/there/{run_name}", at=(5,),
                       between=between)  # fmt: skip
        late = {key: value for key, value in curve(whole).items() if key[1] > 2}
        assert {k: v for k, v in curve(parts).items() if k[1] > 2} == late
        # Broken here and whole there: it is fetched again, and nothing is lost.
        again = broken("again", *options, "save_folder=s3://runs/there/{run_name}", at=(5,),
                       between=spoil)  # fmt: skip
        assert_same(whole, again)
        assert [r["step"] for r in records(again, "event")] == [4, 4]  # set aside, and resumed
        assert (again / "checkpoints" / "broken-ba4-0").is_dir()
        for place in ("parts", "again/ba6"):
            loaded = (f"load_path=s3://runs/there/{place}", "load_weights_only=true")
            name = place.replace("/", "-")
            assert result(broken(f"from-{name}", *options, *loaded))["status"] == "completed"
        # Two nodes that share a folder fetch the same at once; what may not be read is no gap.
        nodes = [RemoteFolder("s3://runs/there/parts") for _ in range(2)]
        meet, fetch = threading.Barrier(2), RemoteFolder._fetch
        with monkeypatch.context() as patch:
            patch.setattr(RemoteFolder, "_fetch", lambda *a: (meet.wait(30), fetch(*a)))
            patch.setattr("platform.node", lambda: f"node{threading.get_ident()}")
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda one: one.fetch_newest(Path("shared")), nodes))
        assert found[0] == found[1] and read_checkpoint(found[0])
        (node,) = nodes[:1]
        client.delete_object(Bucket="runs", Key=f"there/parts/{found[0].name}/{MANIFEST}")
        assert [node.complete(found[0]) for _ in range(2)] == [True, False]  # sent once more
        with monkeypatch.context() as patch:
            patch.setattr(node._store, "download_object", forbidden)
            with pytest.raises(ConfigError, match=r"s3://runs/there/parts: cannot be read"):
                node.fetch_newest(Path("none"))
        assert not [*Path("none").glob("b*")]
        # All broken, in the store alone: it is not begun anew, as if nothing had been.
        shutil.rmtree(parts)
        for thing in client.list_objects_v2(Bucket="runs", Prefix="there/parts/")["Contents"]:
            if thing["Key"].endswith(STATE):
                client.put_object(Bucket="runs", Key=thing["Key"], Body=b"not what was stored")
        for _ in range(2):
            with pytest.raises(DataError, match=r"no checkpoint there is whole .*s3://runs/there"):
                run(*RESUMED, *options, "save_folder=s3://runs/there/{run_name}", "run_name=parts")
        with pytest.raises(DataError, match=r"s3://runs/there/parts: no checkpoint there is whol"):
            run(*RESUMED, *options, "load_path=s3://runs/there/parts", "run_name=none")
        with pytest.raises(ConfigError, match=r"s3://runs/there/again/ba5: no whole checkpoint"):
            run(*RESUMED, *options, "load_path=s3://runs/there/again/ba5", "run_name=none")
        gone = "save_folder=s3://gone/x"
        with pytest.raises(ConfigError, match=r"s3://gone/x: cannot be read"):
            run(*RESUMED, *options, gone, "run_name=nowhere")
        client.create_bucket(Bucket="gone")
        close = type(
            "Close", (Callback,), {"batch_start": lambda *_: client.delete_bucket(Bucket="gone")}
        )
        monkeypatch.setattr(recipe, "build_callbacks", lambda config: [close()])
        with pytest.raises(GuardError, match=r"s3://gone/x: cannot be written"):
            run(*RESUMED, *options, gone, "save_interval=1ba", "run_name=nowhere")
        assert result(Path("runs/nowhere"))["status"] == "failed"
    finally:
        server.stop()
