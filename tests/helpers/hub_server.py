"""A hub on 127.0.0.1: what a real client asks a hub for data sets, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

PAGE = 4  # entries of a listing that come at a time, so that small listings have pages too
_PIECE = 2**14


def lfs_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


@dataclass
class Repo:
    """A data set: the files of each commit, and the commit that each branch names now."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    in_git: frozenset[str] = frozenset()
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Another commit on a branch; gives its name."""
        parts = [branch, str(len(self.commits)), *(f"{path} {lfs_hash(data)}" for path, data in sorted(files.items()))]
        name = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


@dataclass
class Answer:
    """What one request gets instead of the usual.

    Attributes:
        status: of the answer, None: the usual one.
        headers: on top.
        change: makes other bytes of those of the file, of the same length.
        stop_at: the share of the bytes after which the connection is closed.
        reset: close it in anger, as a firewall does.
        hold: nothing is sent until it is set.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] = bytes
    stop_at: float | None = None
    reset: bool = False
    hold: threading.Event | None = None


class HubServer:
    """Serves data sets; ``requests`` has each one's (method, path, Range)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self._faults: list[tuple[str, str, Answer]] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], in_git: frozenset[str] = frozenset()) -> str:
        """A data set, or its next commit on main; gives the commit."""
        self.repos.setdefault(name, Repo(in_git=in_git))
        return self.repos[name].commit(dict(files))

    def fail(self, method: str, path: str, *answers: Answer) -> None:
        """The next requests of a method whose path matches an expression get these answers, one each."""
        self._faults += [(method, path, answer) for answer in answers]

    def mend(self) -> None:
        """All requests get the usual answers again."""
        self._faults.clear()

    def downloads(self) -> list[tuple[str, str]]:
        """(path, Range) of the requests for contents."""
        return [(path, wanted) for method, path, wanted in self.requests if method == "GET" and "/resolve/" in path]

    def answer_for(self, method: str, path: str, wanted: str) -> Answer:
        with self._lock:
            self.requests.append((method, path, wanted))
            for number, (fault_method, pattern, answer) in enumerate(self._faults):
                if fault_method == method and re.search(pattern, path):
                    del self._faults[number]
                    return answer
        return Answer()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle(with_body=False)

    def do_GET(self) -> None:
        self._handle(with_body=True)

    def _handle(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        answer = self.server_hub.answer_for(self.command, path, self.headers.get("Range", ""))
        if answer.hold is not None:
            answer.hold.wait(120)
        with contextlib.suppress(ConnectionError):
            if answer.status is not None:
                self._send(answer.status, b"", answer.headers, with_body)
            elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._info(match[1], match[2] or "main", with_body)
            elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)", path):
                self._tree(match[1], match[2], with_body)
            elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(match[1], match[2], match[3], answer, with_body)
            else:
                self._send(404, b"", {}, with_body)

    def _commit(self, name: str, revision: str, with_body: bool) -> tuple[Repo, str] | None:
        repo = self.server_hub.repos.get(name)
        if repo is None or repo.gated:
            code = {"X-Error-Code": "GatedRepo" if repo else "RepoNotFound"}
            self._send(401 if repo else 404, b"", code, with_body)
            return None
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
            return None
        return repo, commit

    def _info(self, name: str, revision: str, with_body: bool) -> None:
        if found := self._commit(name, revision, with_body):
            self._send(200, json.dumps({"id": name, "sha": found[1]}).encode(), {}, with_body)

    def _tree(self, name: str, revision: str, with_body: bool) -> None:
        if not (found := self._commit(name, revision, with_body)):
            return
        repo, commit = found
        # In no order, as a hub may; the client has to bring its own.
        paths = sorted(repo.commits[commit], key=lambda path: lfs_hash(path.encode()))
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        entries = [_entry(path, repo.commits[commit][path], repo) for path in paths[first : first + PAGE]]
        link = f'<{self.server_hub.url}/api/datasets/{name}/tree/{commit}?cursor={first + PAGE}>; rel="next"'
        headers = {"Link": link} if first + PAGE < len(paths) else {}
        self._send(200, json.dumps(entries).encode(), headers, with_body)

    def _file(self, name: str, revision: str, path: str, answer: Answer, with_body: bool) -> None:
        if not (found := self._commit(name, revision, with_body)):
            return
        repo, commit = found
        if path not in repo.commits[commit]:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, with_body)
            return
        data = repo.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", **answer.headers}
        if path in repo.in_git:
            headers["ETag"] = f'"{git_hash(data)}"'
        else:
            headers |= {"X-Linked-Etag": f'"{lfs_hash(data)}"', "X-Linked-Size": str(len(data))}
        sent, status = answer.change(data), 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            sent = sent[start:]
        stop = None if answer.stop_at is None else int(len(sent) * answer.stop_at)
        self._send(status, sent, headers, with_body, stop)
        if answer.reset:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.connection.close()

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], with_body: bool, stop: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        for start in range(0, len(body[:stop]) if with_body else 0, _PIECE):
            self.wfile.write(body[:stop][start : start + _PIECE])
        if stop is not None:
            self.close_connection = True


def _entry(path: str, data: bytes, repo: Repo) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data)}
    if path in repo.in_git:
        return entry | {"oid": git_hash(data)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{lfs_hash(data)}\nsize {len(data)}\n".encode()
    lfs = {"oid": lfs_hash(data), "size": len(data), "pointerSize": len(pointer)}
    return entry | {"oid": git_hash(pointer), "lfs": lfs}


@contextlib.contextmanager
def serving() -> Iterator[HubServer]:
    """A hub without data sets, for as long as the block runs."""
    with HubServer() as server:
        yield server


@contextlib.contextmanager
def serving_this_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The same, and huggingface_hub in this process knows no other hub, no token, and no cache but ``home``."""
    from huggingface_hub import close_session, constants

    with serving() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
        close_session()
