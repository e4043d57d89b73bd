"""Datasets of a hub: its endpoints on loopback, GLUE's eight tasks as parquet files behind them."""

import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from glue_files import write_glue
from overture.data.shards import Split
from overture.training.glue_tasks import TASKS

ROOT = Path(__file__).parents[2]
COMMIT = "1" * 40
CONVERT = """
import sys
from overture.config.schema import GlueConfig
from overture.training.glue_tasks import TASKS, convert_task, find_missing
tokenizer, *places = sys.argv[1:]
for data, out in zip(places[::2], places[1::2]):
    config = GlueConfig(data=data, data_local=out, tasks=list(TASKS), finetune={})
    find_missing(config)
    for task in TASKS:
        print(convert_task(config, task, tokenizer, 64), convert_task(config, task, tokenizer, 64))
"""


class Hub(BaseHTTPRequestHandler):
    """What reading a dataset asks a hub for: its commit, its files, and parts of them."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if "/resolve/" in path:
            return self.part(path, body=True)
        known = path.startswith("/api/datasets/glue-of/glue")
        if "/tree/" in path:
            place = path.partition(COMMIT)[2].strip("/")
            return self.reply(self.entries(sorted((self.server.folder / place).iterdir())))
        files = [p for p in self.server.folder.rglob("*") if p.is_file()]
        siblings = [{"rfilename": entry["path"]} for entry in self.entries(files)]
        facts = {"id": "glue-of/glue", "sha": COMMIT, "private": False, "siblings": siblings}
        self.reply(facts, None if known else "RepoNotFound")

    def do_POST(self):
        self.server.asked.append(f"POST {self.path}")
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        places = [self.server.folder / path for path in asked["paths"]]
        self.reply(self.entries([place for place in places if place.exists()]))

    def do_HEAD(self):
        self.server.asked.append(f"HEAD {self.path}")
        self.part(self.path, body=False)

    def entries(self, places):
        return [
            {"type": "file" if place.is_file() else "directory", "size": place.stat().st_size,
             "path": str(place.relative_to(self.server.folder)), "oid": "2" * 40}
            for place in places
        ]  # fmt: skip

    def part(self, path, body):
        file = self.server.folder / path.partition("/resolve/")[2].partition("/")[2]
        if not file.is_file():
            return self.reply({}, "EntryNotFound")
        content, code, total = file.read_bytes(), 200, file.stat().st_size
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            code, content = 206, content[int(first) : int(last or total) + 1]
        self.send_response(code)
        for key, value in {
            "Content-Length": len(content), "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(path.encode()).hexdigest()}"', "Accept-Ranges": "bytes",
            "Content-Range": f"bytes 0-{total}/{total}",
        }.items():  # fmt: skip
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def reply(self, content, fault=None):
        body = json.dumps(content).encode()
        self.send_response(404 if fault else 200)
        if fault:
            self.send_header("X-Error-Code", fault)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = folder, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def as_the_hub_has_it(tsv: Path, folder: Path) -> None:
    """Write tsv files of GLUE as the hub has them: parquet, its column names, numbered labels."""
    lines = ["---", "configs:"]
    for task, row in TASKS.items():
        lines += [f"- config_name: {task}", "  data_files:"]
        names = list(row.labels)
        for _, file, split in row.splits:
            with (tsv / row.folder / file).open(encoding="utf-8-sig", newline="") as opened:
                columns = row.columns or next(csv.reader(opened, delimiter="\t"))
                read = csv.DictReader(opened, columns, delimiter="\t", quoting=csv.QUOTE_NONE)
                found = list(read)
            texts = {
                theirs: [one[row.local[ours]] for one in found] for ours, theirs in row.hub.items()
            }
            labels = [one[row.local.get("label", "label")] for one in found]
            numbers = list(map(float if row.regression else names.index, labels))
            table = pyarrow.table({**texts, "label": numbers, "idx": list(range(len(found)))})
            path = folder / task / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(table, path)
            lines += [f"  - split: {split}", f"    path: {task}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# GLUE", ""]))


def run(hub, home, *command):
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "no_proxy": "127.0.0.1",
        "PYTHONPATH": str(ROOT / "src"),
    }  # fmt: skip
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_glue_of_the_hub_is_glue_of_the_files(hub, smoke, tmp_path):
    tsv = write_glue(tmp_path / "tsv")
    as_the_hub_has_it(tsv, hub.folder)
    places = (tsv, tmp_path / "files", "glue-of/glue", tmp_path / "rows")
    done = run(hub, tmp_path / "home", "-c", CONVERT, smoke / "tokenizer", *places)
    assert done.returncode == 0, (hub.asked, done.stderr)
    kept = [word for word in done.stdout.split() if word in ("False", "True")]
    assert kept == ["False", "True"] * 2 * len(TASKS)
    assert "also_held_out" in done.stdout  # what is dropped is said
    for task, row in TASKS.items():
        for split, _, _ in row.splits:
            one, other = (Split(tmp_path / out / task / split) for out in ("files", "rows"))
            assert len(one) == len(other) > 0
            for number in range(len(one)):
                same, theirs = one.row(number), other.row(number)
                assert same.keys() == theirs.keys()
                assert all(np.array_equal(same[k], theirs[k]) for k in same), (task, split, number)
    assert any(path.endswith(f"/{COMMIT}/rte/train-00000-of-00001.parquet") for path in hub.asked)
