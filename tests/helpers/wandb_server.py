"""A stand-in for the W&B server on loopback, with the requests that the real client makes.

Like the real server, it keeps history lines by their offset, so that a line that is sent twice is stored once, and
summary, config, files and artifacts by name. A test can make it stall or fail.
"""

import gzip
import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

#: A key of the right length that no account has.
KEY = "a" * 40


@dataclass
class Run:
    """The data that the server has of one run."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Number of a history line -> its values."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """System metrics; in shared mode a name ends with the label of the client that sent it."""
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """Group, tags and display name."""
    files: dict[str, bytes] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    """Exit codes of the clients that said they were done."""

    @property
    def history(self) -> list[dict[str, Any]]:
        return [row for _, row in sorted(self.rows.items())]


class WandbServer(ThreadingHTTPServer):
    """`with WandbServer() as server:` serves inside the block.

    `fault` is None, an HTTP status with which every request is answered, or "stall", with which no request is answered
    until `fault` is changed.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.runs: dict[str, Run] = defaultdict(Run)
        self.artifacts: dict[str, dict[str, Any]] = {}
        """Id of an artifact -> the fields that the client sent, with the entries of its manifest."""
        self.requests: list[tuple[str, bytes]] = []
        """(path, body) of each request, in order."""
        self._fault: int | str | None = None
        self._changed = threading.Condition()

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a client connects to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    @property
    def fault(self) -> int | str | None:
        return self._fault

    @fault.setter
    def fault(self, fault: int | str | None) -> None:
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def settled(self) -> int | None:
        """Waits until the server does not stall; returns the HTTP status of `fault`, or None."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault != "stall")
            return self._fault if isinstance(self._fault, int) else None

    def handle_error(self, *_: object) -> None:
        """Ignores clients that close their connection."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fault = None
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append((self.path, body))
        status = self.server.settled()
        reply = {"error": "as asked"} if status else self._reply(body)
        data = json.dumps(reply).encode()
        self.send_response(status or 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def _reply(self, body: bytes) -> dict[str, Any]:
        parts = unquote(self.path).strip("/").split("/")
        if self.path == "/graphql":
            query = json.loads(body)
            name = query.get("operationName") or query["query"].split("(")[0].split("{")[0].split()[-1]
            answer = getattr(self, f"_on_{name}", None)
            return {"data": answer(query.get("variables") or {}) if answer else {}}
        if parts[0] == "upload":
            self.server.runs[parts[1]].files["/".join(parts[2:])] = body
        elif parts[0] == "manifest":
            self.server.artifacts[parts[1]]["entries"] = json.loads(body)["contents"]
        elif parts[-1] == "file_stream" and body:
            self._stream(self.server.runs[parts[-2]], json.loads(body))
        return {}

    def _stream(self, run: Run, sent: dict[str, Any]) -> None:
        for name, chunk in sent.get("files", {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if name.endswith(".json") or "jsonl" in name else []
            if name == "wandb-history.jsonl":
                run.rows |= dict(enumerate(lines, chunk["offset"]))
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
            elif "events" in name:
                run.events += lines
        if sent.get("complete"):
            run.exits.append(sent["exitcode"])

    # One method for each GraphQL operation of the client, by its name.

    _PROJECT = {"id": "p", "name": "stack-test", "entity": {"id": "e", "name": "us"}, "entityName": "us"}

    def _on_RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["name"] not in self.server.runs:
            return {"model": {**self._PROJECT, "bucket": None}}
        return {"model": {**self._PROJECT, "bucket": self._bucket(asked["name"])}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.server.runs[name]
        return {
            "id": "b",
            "name": name,
            "displayName": "n",
            "project": self._PROJECT,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "tags": run.about.get("tags") or [],
            "wandbConfig": '{"t": {}}',
        }

    def _on_UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        new = asked["name"] not in self.server.runs
        run = self.server.runs[asked["name"]]
        run.about |= {key: value for key, value in asked.items() if value is not None}
        run.config |= {key: value["value"] for key, value in json.loads(asked.get("config") or "{}").items()}
        return {"upsertBucket": {"bucket": self._bucket(asked["name"]), "inserted": new}}

    def _on_CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.server.url}/upload/{asked['run']}/"
        files = [{"name": name, "uploadUrl": url + name} for name in asked["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "v", "username": "us", "entity": "us", "flags": "{}", "teams": {"edges": []}}}

    # As on the real server, a new artifact whose content exists already is the existing artifact.

    def _on_CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        about = asked["input"]
        collection = about["artifactCollectionName"]
        identity = f"{collection}-{about['digest']}"
        known = identity in self.server.artifacts
        self.server.artifacts.setdefault(identity, {}).update(about)
        artifact = {
            "id": identity,
            "state": "COMMITTED" if known else "PENDING",
            "artifactSequence": {"id": "s", "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _on_CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.server.url}/manifest/{asked['artifactID']}"
        file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": asked["artifactID"], "file": file}}}

    def _on_CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answers for artifacts whose files are uploaded: tables."""
        nodes = []
        for spec in asked["input"]["artifactFiles"]:
            url = f"{self.server.url}/artifact/{spec['artifactID']}/{spec['name']}"
            node = {"id": "f", "name": spec["name"], "displayName": spec["name"], "uploadUrl": url, "uploadHeaders": []}
            nodes.append({"node": {**node, "storagePath": spec["name"], "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _on_UpdateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        identity = asked["artifactManifestID"]
        file = {"id": "f", "uploadUrl": f"{self.server.url}/manifest/{identity}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": identity, "file": file}}}

    def _on_CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.server.artifacts[asked["artifactID"]]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}

    def _on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}
