"""A model hub of one's own: the few routes that the hub's client asks, over folders of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Repository:
    """A model or data set at one commit, which its files decide."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        content = [(name, digest(path)) for name, path in sorted(self.files.items())]
        self.commit = hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.files]
        about = {"id": self.name, "sha": self.commit, "siblings": siblings, "tags": []}
        return about | {"private": False, "gated": False, "disabled": False, "downloads": 0}

    def tree(self, below: str = "") -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest(path)}
            for name, path in self.files.items()
            if name.startswith(below)
        ]


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for `repositories`, by `models/owner/name` or `datasets/owner/name`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, repositories: Mapping[str, Repository], *arguments: Any) -> None:
        self.repositories = repositories
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._answer(asked=None)

    def do_HEAD(self) -> None:
        self._answer(asked=None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = [unquote(pair.partition("=")[2]) for pair in body.split("&") if "paths" in pair]
        self._answer(asked=[paths] if isinstance(paths, str) else paths)

    def _answer(self, *, asked: list[str] | None) -> None:
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case [""]:
                self._send(b"")
            case ["api", kind, owner, name, *rest] if repo := self._find(kind, owner, name, rest):
                self._describe(repo, rest, asked)
            case ["datasets", owner, name, "resolve", _, *file] if repo := self._find(
                "datasets", owner, name, []
            ):
                self._file(repo, "/".join(file))
            case [owner, name, "resolve", _, *file] if repo := self._find(
                "models", owner, name, []
            ):
                self._file(repo, "/".join(file))
            case _:
                self._refuse("RepoNotFound")

    def _find(self, kind: str, owner: str, name: str, rest: list[str]) -> Repository | None:
        repo = self.repositories.get(f"{kind}/{owner}/{name}")
        known = repo and {"main", repo.commit}
        return repo if repo and (len(rest) < 2 or rest[1] in (known or ())) else None

    def _describe(self, repo: Repository, rest: list[str], asked: list[str] | None) -> None:
        match rest:
            case [] | ["revision", _]:
                self._json(repo.info())
            case ["tree", _, *below]:
                self._json(repo.tree("/".join(below)))
            case ["paths-info", _]:
                self._json([entry for entry in repo.tree() if entry["path"] in (asked or ())])
            case _:
                self._refuse("EntryNotFound")

    def _file(self, repo: Repository, name: str) -> None:
        if name not in repo.files:
            self._refuse("EntryNotFound", repo.commit)
            return
        path = repo.files[name]
        self._send(path.read_bytes(), **{"ETag": f'"{digest(path)}"', "X-Repo-Commit": repo.commit})

    def _refuse(self, code: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(b"{}", status=404, **(headers | ({"X-Repo-Commit": commit} if commit else {})))

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        return


@contextmanager
def serve(**folders: Path) -> Iterator[tuple[str, dict[str, Repository]]]:
    """The address of a hub that has each folder as `owner/NAME`, a model or a data set by its name."""
    repositories = {}
    for key, folder in folders.items():
        kind, _, name = key.partition("_")
        repositories[f"{kind}s/owner/{name}"] = Repository(f"owner/{name}", folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, repositories))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
