"""`model.name=org/name` is downloaded from a hub once and then read from the cache; without a network it is refused
within seconds."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": b"stands for weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"never fetched",
}


class Hub(BaseHTTPRequestHandler):
    """A stand-in for a hub with one repository, org/tiny."""

    files = FILES
    asked: list[str] = []

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path == "/api/models/org/tiny/revision/main":
            return self._answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": f"{n}-etag"} for n, c in self.files.items()]
            return self._answer(json.dumps(tree).encode())
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        return self._answer(self.files.get(name), etag=f'"{name}-etag"')

    do_HEAD = do_GET

    def _answer(self, content: bytes | None, etag: str = '""') -> None:
        self.send_response(404 if content is None else 200)
        for name, value in (("ETag", etag), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(content or b"")))):
            self.send_header(name, value)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


@contextmanager
def hub(files=FILES):
    """Runs a hub; yields its address and the list of requested paths."""
    handler = type("Handler", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def nowhere() -> str:
    """An address at which no server listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


_PROGRAM = """
import json, sys, time
from stack.config.compose import compose
from stack.config.model_folder import base_fields, check_weights, local_folder
from stack.errors import ConfigError
start = time.monotonic()
try:
    pretrained = ["model=folder", "model.init=pretrained", "optim.lr=1e-5"]
    cfg = compose([*pretrained, *(sys.argv[2:] or ["model.name=org/tiny"])])
    folder = local_folder("org/tiny", weights=sys.argv[1] == "weights")
    if sys.argv[1] == "weights":
        check_weights("org/tiny", folder)
    result = {"fields": base_fields("org/tiny"), "files": sorted(path.name for path in folder.iterdir())}
except ConfigError as error:
    result = {"error": str(error)}
print(json.dumps({**result, "seconds": time.monotonic() - start, "torch": "torch" in sys.modules}))
"""


def ask(what: str, home: Path, endpoint: str, *overrides: str, offline: bool = False) -> dict:
    """The result for the name org/tiny in a new process, which is needed because the Hugging Face libraries read their
    settings at import."""
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1" if offline else "0"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, what, *overrides],
        env={**os.environ, **proxies, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    result = json.loads(done.stdout)
    assert not result["torch"]
    assert result["seconds"] < 5
    return result


def test_a_hub_is_asked_once_and_for_what_is_needed(tmp_path, nowhere):
    with hub() as (endpoint, asked):
        found = ask("config", tmp_path, endpoint)
        assert (found["fields"], found["files"]) == (CONFIG, ["config.json"])
        assert not any("model.safetensors" in path for path in asked)
        whole = ask("weights", tmp_path, endpoint)
        assert whole["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
        assert not any("pytorch_model.bin" in path for path in asked)
        del asked[:]
        assert ask("weights", tmp_path, endpoint)["files"] == whole["files"]
        assert asked == []
    for offline in (False, True):
        assert ask("weights", tmp_path, nowhere, offline=offline)["files"] == whole["files"]


def test_a_snapshot_that_another_program_left_unfinished_is_completed(tmp_path):
    shards = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()}
    shards |= {"model-1.safetensors": b"weights", "config.json": FILES["config.json"]}
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.index.json").write_bytes(shards["model.safetensors.index.json"])
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    with hub(shards) as (endpoint, _):
        assert ask("weights", tmp_path, endpoint)["files"] == sorted(shards)


def test_a_hub_that_cannot_be_reached_is_said_in_seconds(tmp_path, nowhere):
    line = f"model.name=org/tiny: no folder here, not whole in the Hugging Face cache, and {nowhere} cannot be reached"
    for what in ("config", "weights"):
        error = ask(what, tmp_path, nowhere)["error"]
        assert error.startswith(line)
        assert error.endswith("; download it where there is a network, and give its folder")
        assert "\n" not in error
    # The cache has the config, but not the weights.
    with hub() as (endpoint, _):
        ask("config", tmp_path, endpoint)
    assert ask("config", tmp_path, nowhere, offline=True)["fields"] == CONFIG
    assert ask("weights", tmp_path, nowhere, offline=True)["error"].startswith(line)


def test_a_name_that_the_hub_does_not_have(tmp_path):
    with hub() as (endpoint, _):
        error = ask("config", tmp_path, endpoint, "model.name=org/other")["error"]
    assert error.startswith(f"model.name=org/other: no folder here, and {endpoint} does not give it (")
    assert error.endswith("; check the spelling, or log in with `hf auth login` if it is gated")


def test_a_hub_model_without_safetensors(tmp_path):
    with hub({name: content for name, content in FILES.items() if name != "model.safetensors"}) as (endpoint, _):
        error = ask("weights", tmp_path, endpoint)["error"]
    assert error.startswith(
        "model.name=org/tiny: it has no model.safetensors on the hub; if you trust the author, convert it with Auto"
    )
