"""A Hugging Face hub in this process: repositories, commits, uploads by LFS and inline, files at a revision."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_" + "x" * 34
"""May write to everything but what belongs to `others`."""

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a list of (commit, files), oldest first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, list[tuple[str, Files]]] = {}
        self.private: set[str] = set()
        self.objects: Files = {}
        self.asked: list[str] = []
        self.fails = 0
        """The status that every request is answered with, unless 0."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, files: Files, deleted: Iterable[str] = ()) -> str:
        """A new state of a repository, after the last one."""
        history = self.repositories.setdefault(name, [])
        state = {**(history[-1][1] if history else {}), **files}
        for path in deleted:
            del state[path]
        described = repr((name, len(history), sorted((k, hashlib.sha256(v).hexdigest()) for k, v in state.items())))
        history.append((hashlib.sha1(described.encode()).hexdigest(), state))
        return history[-1][0]

    def at(self, name: str, revision: str) -> tuple[str, Files] | None:
        history = self.repositories.get(name, [])
        if revision == "main":
            return history[-1] if history else None
        return next((state for state in history if state[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _say(self, status: int, value: Any = None, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refused(self, name: str = "", *, writes: bool = False) -> bool:
        """Answers in the place of the request when it may not be made."""
        self.server.asked.append(f"{self.command} {self.path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.fails:
            self._say(self.server.fails, {"error": "in trouble"})
        elif token and token != TOKEN:
            self._say(401, {"error": "Invalid user token."})
        elif writes and not token:
            self._say(401, {"error": "Unauthorized"})
        elif writes and name.startswith("others/"):
            self._say(403, {"error": f"You don't have the rights to write to {name}"})
        elif not writes and name not in self.server.repositories:
            self._say(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            return False
        return True

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path):
            name, kind, revision = found.groups()
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path):
            name, kind, revision = found.groups()[:3]
        else:
            self._say(404, {"error": path})
            return
        if self._refused(name):
            return
        state = self.server.at(name, revision or "main")
        if state is None:
            self._say(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        elif kind == "tree":
            self._say(200, [_entry(path, content) for path, content in state[1].items()])
        elif kind == "resolve":
            content = state[1][found[4]]
            self._say(200, content, ETag=f'"{_oid(found[4], content)}"', X_Repo_Commit=state[0])
        else:
            self._say(200, {"id": name, "sha": state[0], "private": name in self.server.private, "siblings": []})

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._say(200, {})

    def do_POST(self) -> None:
        path, body = unquote(self.path.split("?")[0]), self._body()
        if path == "/api/validate-yaml":
            bad = not json.loads(body)["content"].startswith("---\n")
            self._say(400 if bad else 200, {"errors": [{"message": "no front matter"}] if bad else [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            self._create(f"{asked['organization']}/{asked['name']}", private=asked.get("visibility") == "private")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            if not self._refused(found[1], writes=True):
                self._say(200, {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            if not self._refused(found[1], writes=True):
                (self._preupload if found[2] == "preupload" else self._commit)(found[1], body)
        else:
            self._say(404, {"error": path})

    def _create(self, name: str, *, private: bool) -> None:
        if self._refused(name, writes=True):
            return
        if name in self.server.repositories:
            self._say(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
            return
        self.server.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.private |= {name} if private else set()
        self._say(200, {"url": f"{self.server.url}/{name}", "id": name})

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}

    def _preupload(self, name: str, body: bytes) -> None:
        there = self.server.repositories[name][-1][1]
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if _is_lfs(path) else "regular",
                "shouldIgnore": False,
                "oid": _oid(path, there[path]) if path in there else None,
            }
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        self._say(200, {"files": files})

    def _commit(self, name: str, body: bytes) -> None:
        files: Files = {}
        deleted: list[str] = []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
        commit = self.server.commit(name, files, deleted)
        self._say(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})


def _is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def _oid(path: str, content: bytes) -> str:
    """The SHA-256 of what lies in LFS, git's own digest of everything else."""
    if _is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens on this machine for as long as the block lasts."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """What a process needs in its environment to take this hub for the real one."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }


def take_for_the_real_one(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for this process, whose client has read its environment already."""
    from huggingface_hub import constants

    for name, value in environment(hub, home).items():
        monkeypatch.setenv(name, value)
    for name, setting in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, setting)
