"""Upload to a hub: a small server that has its endpoints, right and wrong tokens, nobody there."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEND = """
import os, sys
from pathlib import Path
from overture.errors import ConfigError
from overture.hub import check_hub, push_to_hub
for token, name in [pair.split(":") for pair in sys.argv[2:]]:
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    try:
        check_hub(name)
        print(push_to_hub(Path(sys.argv[1]), name, private=True))
    except ConfigError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """The endpoints that creating a repository and uploading a folder need."""

    def reply(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.removeprefix("/api/models/")
        repo = self.server.repos.get(name)
        if repo is None:
            return self.reply({"error": "no such repository"}, 404)
        return self.reply({"id": name, "private": repo["private"]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        token = self.headers["Authorization"].removeprefix("Bearer ")
        url = f"http://{self.headers['Host']}"
        repos, path = self.server.repos, self.path
        if token != "right-token":
            return self.reply({"error": "no"}, 403 if token == "readers-token" else 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            code = 409 if name in repos else 200
            repos.setdefault(name, {"private": wanted.get("private", False), "files": {}})
            return self.reply({"url": f"{url}/{name}"}, code)
        if path == "/api/validate-yaml":
            return self.reply({})
        if path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            kinds = {True: "lfs", False: "regular"}
            files = [
                {"path": p, "uploadMode": kinds[p.endswith(".safetensors")], "shouldIgnore": False}
                for p in paths
            ]
            return self.reply({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            for thing in (objects := json.loads(body)["objects"]):
                thing["actions"] = {"upload": {"href": f"{url}/store/{thing['oid']}"}}
            return self.reply({"transfer": "basic", "objects": objects})
        name = "/".join(path.split("/")[3:5])
        files = repos[name]["files"]
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] != "header":
                value = row["value"]
                files[value["path"]] = value.get("content") or self.server.stored[value["oid"]]
        return self.reply({"commitUrl": f"{url}/{name}/commit/1", "commitOid": "1"})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self.reply({})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.stored = {"me/public": {"private": False, "files": {}}}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send(port, folder, *pairs):
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(folder.parent / "home"),
        "no_proxy": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SEND, str(folder), *pairs],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_export_is_uploaded_with_the_right_token_only(hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    port = hub.server_address[1]
    pairs = (
        "right-token:me/model", "wrong-token:me/other", "readers-token:me/other", ":me/other",
        "right-token:me/public",
    )  # fmt: skip
    sent, wrong, reader, none, public = send(port, folder, *pairs)
    assert sent == f"http://127.0.0.1:{port}/me/model"
    assert "me/other: the token is not valid" in wrong
    assert "me/other: the token has no right to write there" in reader
    assert "there is no token; set HF_TOKEN" in none
    assert "me/public is there already, and public: nothing was sent" in public
    repo = hub.repos["me/model"]
    assert repo["private"]
    assert repo["files"].keys() == {"README.md", "model.safetensors"}
    assert repo["files"]["model.safetensors"] == bytes(range(256)) * 40
    assert "me/other" not in hub.repos
    assert not hub.repos["me/public"]["files"]
    hub.shutdown()
    hub.server_close()
    (away,) = send(port, folder, "right-token:me/model")
    assert "cannot be reached or written to: " in away
    assert f"{folder} is whole" in away
