"""Upload to a hub: a small server that has its endpoints, right and wrong tokens, nobody there."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
        print(push_to_hub(Path(sys.argv[1]), name, private=True)[1])
    except ConfigError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """The endpoints that creating a repository, uploading a folder and loading it need."""

    def reply(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        if "/resolve/" in self.path:
            return self.file(True)
        name = self.path.removeprefix("/api/models/").removesuffix("/revision/main")
        name = name.removesuffix("/auth-check")
        if "/tree/main" in name:
            files = self.server.repos[name.split("/tree/")[0]]["files"]
            rows = [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in files]
            return self.reply(rows)
        repo = self.server.repos.get(name)
        if repo is None:
            return self.reply({"error": "no such repository"}, 404)
        files = [{"rfilename": path} for path in repo["files"]]
        more = {"sha": "1" * 40, "siblings": files}
        return self.reply({"id": name, "private": repo["private"], **more})

    def do_HEAD(self):
        self.reply("") if self.path == "/" else self.file(False)

    def file(self, body):
        """Send a file as it was uploaded: a small one in base64, a large one as it is."""
        _, me, name, _, _, path = self.path.split("/", 5)
        repo = self.server.repos.get(f"{me}/{name}", {"files": {}})
        content = repo["files"].get(path)
        if content is None or self.headers.get("Authorization") != "Bearer right-token":
            self.send_response(404)
            may_read = self.headers.get("Authorization") == "Bearer right-token"
            error = "EntryNotFound" if may_read and repo["files"] else "RepoNotFound"
            self.send_header("X-Error-Code", error)
            self.end_headers()
            return
        content = base64.b64decode(content) if isinstance(content, str) else content
        self.send_response(200)
        for key, value in {
            "Content-Length": len(content), "X-Repo-Commit": "1" * 40,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }.items():  # fmt: skip
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

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
            if row["key"] == "deletedFile":
                del files[row["value"]["path"]]
            elif row["key"] != "header":
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
    server.asked, server.repos, server.stored = (
        [],
        {"me/public": {"private": False, "files": {}}},
        {},
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send(port, folder, *pairs):
    done = start(port, folder.parent, "-c", SEND, folder, *pairs)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def start(port, home, *command, **more):
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(home / "home"), "no_proxy": "127.0.0.1",
        **more,
    }  # fmt: skip
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_an_export_is_uploaded_with_the_right_token_only(hub, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    port = hub.server_address[1]
    pairs = (
        "right-token:me/model", "wrong-token:me/other", "readers-token:me/other", ":me/other",
        "right-token:me/public", "right-token:me/used",
    )  # fmt: skip
    earlier = dict.fromkeys(["adapter_config.json", "model-00001-of-2.safetensors", "notes.md"], "")
    hub.repos["me/used"] = {"private": True, "files": earlier}
    sent, wrong, reader, none, public, _ = send(port, folder, *pairs)
    # Adapters or weights of an earlier export would be loaded in place of these.
    assert earlier.keys() == {"README.md", "model.safetensors", "notes.md"}
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


def test_export_uploads_and_what_is_there_is_asked(hub, smoke, tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smoke / "tokenizer")
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=4, initializer_range=0.5, eos_token_id=0, bos_token_id=0)
    )  # fmt: skip
    ids = tokenizer("the", return_tensors="pt").input_ids
    made = network.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    for place in ("base", "adapters"):
        network.save_pretrained(tmp_path / place)
        tokenizer.save_pretrained(tmp_path / place)
        network = network if place == "adapters" else get_peft_model(network, LoraConfig())
    settings = tmp_path / "adapters" / "adapter_config.json"
    content = json.loads(settings.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    settings.write_text(json.dumps(content | {"task_type": "CAUSAL_LM"}))
    command = (hub.server_address[1], tmp_path, ROOT / "src" / "export_model.py")
    send_it = ("--push_to_hub", "me/made", "--private", "--test_prompt", "the")
    done = start(*command, tmp_path / "base", "--out", tmp_path / "out", *send_it,
                 HF_TOKEN="right-token")  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = tokenizer.decode(made, skip_special_tokens=True)
    assert f"the{text}".replace("\r", "\n") in done.stdout
    assert "/me/made/resolve/main/model.safetensors" in hub.asked
    assert {"config.json", "model.safetensors", "README.md"} < hub.repos["me/made"]["files"].keys()
    # Adapters alone would point at a folder that nobody else has.
    done = start(*command, tmp_path / "adapters", "--out", tmp_path / "other", *send_it,
                 HF_TOKEN="right-token")  # fmt: skip
    assert done.returncode == 2
    assert "base, which is on this machine alone; give --merge" in done.stderr
    assert not (tmp_path / "other").exists()


def test_adapters_of_the_hub_are_used_and_trained_on(hub, smoke, tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smoke / "tokenizer")
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
                    eos_token_id=0, bos_token_id=0)
    )  # fmt: skip
    network.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    wanted = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    network = get_peft_model(network, wanted)
    network.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    network.save_pretrained(tmp_path / "adapters")
    tokenizer.save_pretrained(tmp_path / "adapters")
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapters").iterdir()}
    files["checkpoint-9/adapter_model.safetensors"] = b"none of ours"
    hub.repos["me/adapters"] = {"private": True, "files": files}
    ids = tokenizer("the", return_tensors="pt").input_ids
    made = network.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    with network.disable_adapter():
        other = network.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    assert not other[0, ids.shape[1] :].equal(made)
    place = (hub.server_address[1], tmp_path)
    asked = (ROOT / "src" / "generate_text.py", "me/adapters", "--prompt", "the",
             "--max_new_tokens", 24)  # fmt: skip
    done = start(*place, *asked, "--out", tmp_path / "said.jsonl", HF_TOKEN="right-token")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.jsonl").read_text())
    assert text in said.values(), said
    assert not any("checkpoint-9" in path for path in hub.asked)
    options = (
        f"model={{name: {tmp_path}/base, adapter: me/adapters, pretrained: true}}", "lora=null",
        f"run_folder={tmp_path}/run", "max_duration=1ba", "eval_first=false",
        f"tokenizer_name={smoke}/tokenizer",
    )  # fmt: skip
    yaml = ROOT / "yamls" / "smoke" / "finetune.yaml"
    done = start(*place, ROOT / "finetune.py", yaml, *options, HF_TOKEN="right-token")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "run" / "hf" / "adapter_config.json").read_text())
    assert kept["target_modules"] == ["q_proj"]
    assert kept["base_model_name_or_path"] == str(tmp_path / "base")
    # A name without a token that may read is not taken for one without adapters.
    done = start(*place, *asked[:1], tmp_path / "base", "--adapter", "me/adapters", *asked[2:],
                 HF_HOME=str(tmp_path / "nobody"))  # fmt: skip
    assert done.returncode == 2
    assert "me/adapters: adapters that cannot be fetched" in done.stderr


def test_what_is_in_the_cache_is_used_at_once_where_the_hub_cannot_be_reached(hub, smoke, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smoke / "tokenizer")
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, bos_token_id=0)
    )  # fmt: skip
    network.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.repos["me/base"] = {"private": False, "files": files}
    yaml = ROOT / "yamls" / "smoke" / "finetune.yaml"
    doctor = hub.server_address[1], tmp_path, ROOT / "src" / "check_setup.py", yaml
    asks = "model={name: me/base, pretrained: true}", "lora.target_modules=[q_proj]"
    asks = *asks, "tokenizer_name=me/base", f"run_folder={tmp_path}/run"
    done = start(*doctor, *asks, HF_TOKEN="right-token")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok      hub          me/base: there" in done.stdout
    hub.shutdown()
    hub.server_close()
    began = time.monotonic()
    done = start(*doctor, *asks)
    assert time.monotonic() - began < 60
    assert done.returncode == 0, done.stdout + done.stderr
    away = f"http://127.0.0.1:{doctor[0]} cannot be reached"
    assert f"warning hub          {away}: me/base must be in the cache" in done.stdout
    assert "Retry" not in done.stderr
    done = start(*doctor, *asks, "model.name=me/other")
    assert done.returncode == 2
    none = "model.name: me/other: the hub is not asked, or cannot be, and the cache has none"
    assert f"STOP    run          {none}" in done.stdout
