"""A stand-in for a model hub on this machine: the part of Hugging Face's interface that a push and a load use.

Seen with huggingface-hub 2.4.0, xet off. Uploads arrive in two ways: small files inside of the commit, those called
``lfs`` by a PUT before it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Repositories: per name and branch the commits, and per commit the files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fails: tuple[str, int] | None = None
        """Requests that match are refused with this status; with 0 they are never answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[name][branch]]

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{name}{len(self.commits)}".encode()).hexdigest()
        self.branches.setdefault(name, {})[branch], self.commits[sha] = sha, files
        return sha


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        hub, path = self.server, unquote(self.path.partition("?")[0])
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if hub.fails is not None and re.search(hub.fails[0], hub.requests[-1]):
            if hub.fails[1] == 0:
                time.sleep(30)
            self._send(hub.fails[1] or 500, {"error": "as the test wants it"})
        elif self.command in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {TOKEN}" and (
            not path.startswith("/blobs/")
        ):  # fmt: skip
            self._send(401, {"error": "no such token"})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'user'}/{asked['name'].rpartition('/')[2]}"
            found = name in hub.branches
            if not found:
                hub.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
                hub.commit(name, "main", {".gitattributes": b""})
            self._send(409 if found else 200, {"url": f"{hub.url}/{name}", "error": "it is there already"})
        elif found := re.fullmatch(r"/blobs/(\w+)", path):
            hub.blobs[found[1]] = data
            self._send(200, {})
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self._send(200, {"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{hub.url}/blobs/{each['oid']}"}}}
                for each in json.loads(data)["objects"]
            ]})  # fmt: skip
        elif (found := re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(?:/(.*))?", path)) is None or (
            found[1] not in hub.branches
        ):
            self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            self._of_a_repository(hub, found[1], (found[2] or "").split("/"), data)

    def _of_a_repository(self, hub: Hub, name: str, words: list[str], data: bytes) -> None:
        branches = hub.branches[name]
        revision = words[1] if len(words) > 1 else "main"
        sha = revision if revision in hub.commits else branches.get(revision)
        if words[0] == "branch":
            known = revision in branches
            branches.setdefault(revision, branches["main"])
            self._send(409 if known else 200, {"error": "it is there already"})
        elif sha is None:
            self._send(404, {"error": "not found"}, {"X-Error-Code": "RevisionNotFound"})
        elif words[0] in ("", "revision"):
            self._send(200, {"id": name, "sha": sha, "private": hub.private[name], "siblings": []})
        elif words[0] == "tree":
            sizes = {
                path: (len(content), hashlib.sha1(content).hexdigest()) for path, content in hub.commits[sha].items()
            }
            self._send(200, [{"type": "file", "path": k, "size": n, "oid": oid} for k, (n, oid) in sizes.items()])
        elif words[0] == "preupload":
            self._send(200, {"files": [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".mp4", ".png")) else "regular"}
                for each in json.loads(data)["files"]
            ]})  # fmt: skip
        elif words[0] == "commit":
            content = dict(hub.commits[sha])
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    content[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del content[value["path"]]
            sha = hub.commit(name, revision, content)
            self._send(200, {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha})
        elif words[0] == "resolve" and (found := hub.commits[sha].get("/".join(words[2:]))) is not None:
            self._send(200, found, {"ETag": f'"{hashlib.sha1(found).hexdigest()}"', "X-Repo-Commit": sha})
        else:
            self._send(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
