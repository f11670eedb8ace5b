"""A hub on this machine, of as much of its API as the client's commits and downloads take.

Source of the API: https://huggingface.co/docs/hub/api, and what huggingface_hub sends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What it holds, and what it was asked.

    Attributes:
        files: of each repository, by name.
        private: whether each is.
        objects: large files that were sent, by SHA-256.
        asked: method and path of each request.
        ranges: first byte of each download that was asked to start in the middle, by path.
        cut: paths whose download breaks off in the middle, as long as they are in it.
        refuses: what it says to a commit, which is refused then.
    """

    endpoint: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    refuses: str | None = None
    token: str = "hf_of_the_test"

    def sha(self, repo: str) -> str:
        """Of the repository's one commit."""
        state = repr(sorted(self.files[repo].items()))
        return hashlib.sha1(state.encode()).hexdigest()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which the client finds it, and nothing else."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A hub that answers on 127.0.0.1 until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        hub, path = self.held, self._path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._json(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            there = repo in hub.files
            hub.files.setdefault(repo, {})
            wanted = bool(asked.get("private") or asked.get("visibility") == "private")
            hub.private.setdefault(repo, wanted)
            self._json(409 if there else 200, {"url": f"{hub.endpoint}/{repo}"})
        elif path == "/api/validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".bin") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for name in names
            ]
            self._json(200, {"files": modes})
        elif re.search("/preupload/[^/]+$", path):
            self._no_revision()
        elif path.endswith("/info/lfs/objects/batch"):
            self._json(200, {"transfer": "basic", "objects": self._batch(json.loads(body))})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/commit/main", path):
            self._commit(found[1], body)
        else:
            self._json(404, {"error": f"no {path}"})

    def _batch(self, asked: Any) -> list[dict[str, Any]]:
        """For each large file where to send it, if it is not there yet."""
        return [
            {**one}
            if one["oid"] in self.held.objects
            else {**one, "actions": {"upload": {"href": f"{self.held.endpoint}/put/{one['oid']}"}}}
            for one in asked["objects"]
        ]

    def _commit(self, repo: str, body: bytes) -> None:
        if self.held.refuses is not None:
            self._json(400, {"error": self.held.refuses})
            return
        files = self.held.files[repo]
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.held.objects[value["oid"]]
        url = f"{self.held.endpoint}/{repo}/commit/{self.held.sha(repo)}"
        self._json(
            200,
            {"success": True, "commitOid": self.held.sha(repo), "commitUrl": url, "hookOutput": ""},
        )

    def do_PUT(self) -> None:
        path = self._path()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if found := re.fullmatch(r"/api/models/(.+/.+)/settings", path):
            asked = json.loads(body)
            self.held.private[found[1]] = asked.get("private", asked.get("visibility") == "private")
            self._json(200, {})
            return
        oid = path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.held.objects[oid] = body
        self._json(200, {})

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def do_GET(self) -> None:
        hub, path = self.held, self._path()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if found[1] not in hub.files:
                self._json(
                    404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"}
                )
                return
            if not self._has(found[1], found[2]):
                self._no_revision()
                return
            names = [{"rfilename": n, "size": len(c)} for n, c in hub.files[found[1]].items()]
            info = {"id": found[1], "sha": hub.sha(found[1]), "private": hub.private[found[1]]}
            self._json(200, {**info, "siblings": names, "tags": [], "downloads": 0})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = hub.files[found[1]].items()
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files
            ]
            self._json(200, tree)
        else:
            self._resolve(with_body=True)

    def _resolve(self, *, with_body: bool) -> None:
        hub, path = self.held, self._path()
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        content = found and hub.files.get(found[1], {}).get(unquote(found[3]))
        if not found or content is None:
            self._json(404, {"error": "not found"}, **{"X-Error-Code": "EntryNotFound"})
            return
        if not self._has(found[1], found[2]):
            self._no_revision()
            return
        start = 0
        if with_body and (wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(wanted[1])
            hub.ranges[found[3]] = start
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", hub.sha(found[1]))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not with_body:
            return
        if found[3] in hub.cut:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _has(self, repo: str, revision: str | None) -> bool:
        return revision in (None, "main", self.held.sha(repo))

    def _no_revision(self) -> None:
        self._json(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound"})

    def _path(self) -> str:
        path = urlsplit(self.path).path
        self.held.asked.append(f"{self.command} {path}")
        return path

    def _json(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
