"""A hub on this machine: the requests that huggingface_hub sends to fetch files and to commit some, answered from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_a_test"


@dataclass
class Repository:
    """Files of each branch, and how the repository may be seen."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or commit."""
        by_commit = {commit_of(files): files for files in self.branches.values()}
        return self.branches.get(revision, by_commit.get(revision))


def commit_of(files: dict[str, bytes]) -> str:
    """A name for these contents, of the form of a commit's."""
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


class Answer(NamedTuple):
    """What a request gets."""

    content: bytes = b"{}"
    status: int = 200
    headers: Mapping[str, str] = {}


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status)


def missing(what: str) -> Answer:
    return Answer(status=404, headers={"X-Error-Code": f"{what}NotFound"})


@dataclass
class Hub:
    """What the hub has, and which requests came. `refuses`: the status of every commit."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuses: int = 0

    def get(self, parts: list[str], signed: bool) -> Answer:
        """A repository, the names of its files, or one of them."""
        api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        found = self.repositories.get(name)
        if found is None or (found.private and not signed):
            return missing("Repo")
        if not rest:
            return as_json({"id": name, "private": found.private, "sha": commit_of(found.branches["main"])})
        if (files := found.at(rest[1])) is None:
            return missing("Revision")
        if rest[0] == "tree":
            return as_json([{"type": "file", "path": file, "size": len(content), "oid": commit_of({file: content})}
                            for file, content in files.items()])
        headers = {"X-Repo-Commit": commit_of(files)}
        if (content := files.get(rest[2])) is None:
            return Answer(b"", 404, headers | {"X-Error-Code": "EntryNotFound"})
        return Answer(content, 200, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def post(self, parts: list[str], lines: list[Any], signed: bool) -> Answer:
        """Make a repository, a branch or a commit. `lines`: the JSON that was sent."""
        if not signed:
            return as_json({"error": "Invalid username or password."}, 401)
        if parts == ["api", "repos", "create"]:
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            private = bool(lines[0].get("private") or lines[0].get("visibility") == "private")
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, Repository(private))
            return as_json({"url": f"{self.address}/{name}"}, status)
        if parts == ["api", "validate-yaml"]:
            return as_json({"errors": [], "warnings": []})
        if self.refuses:
            return as_json({"error": "You have no rights\nhere"}, self.refuses)
        name, (what, branch) = "/".join(parts[2:4]), parts[4:6]
        if what == "branch":
            branches = self.repositories[name].branches
            branches.setdefault(branch, dict(branches["main"]))
            return Answer()
        if what == "preupload":
            return as_json({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                                      for one in lines[0]["files"]]})
        assert what == "commit", parts
        return self.commit(name, branch, lines)

    def commit(self, name: str, branch: str, lines: list[Any]) -> Answer:
        found = self.repositories[name]
        files = dict(found.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                found.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        found.branches[branch] = files
        return as_json({"commitUrl": f"{self.address}/{name}/commit/{commit_of(files)}", "commitOid": commit_of(files)})


class Handler(BaseHTTPRequestHandler):
    """Reads a request and writes the answer of the hub."""

    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def respond(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts, signed = path.strip("/").split("/"), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST":
            answer = self.hub.post(parts, [json.loads(line) for line in body.splitlines()], signed)
        else:
            answer = self.hub.get(parts, signed) if path != "/" else Answer()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def do_GET(self) -> None:
        self.respond()

    def do_HEAD(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        self.respond(self.rfile.read(int(length)) if length else self.chunks())

    def chunks(self) -> bytes:
        """The body of a request that is sent in chunks."""
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub goes to, with a token, and an empty cache."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    at(hub.address, monkeypatch)
    set_constants(monkeypatch, HF_HUB_CACHE=str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub go to the hub at this address."""
    set_constants(monkeypatch, HF_HUB_OFFLINE=False, ENDPOINT=address, HF_URL_HOSTS=frozenset({"127.0.0.1"}),
                  HUGGINGFACE_CO_URL_TEMPLATE=address + "/{repo_id}/resolve/{revision}/{filename}")


def set_constants(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Set constants of huggingface_hub, wherever one of its modules has its own copy, as those of older versions have."""
    for name in ("constants", "file_download", "hf_api"):
        pytest.importorskip(f"huggingface_hub.{name}")
    for module in [module for name, module in sys.modules.items() if name.startswith("huggingface_hub.")]:
        for name in values.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, values[name])
