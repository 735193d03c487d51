"""The evaluation bundle: fetched from a server on this machine, unpacked whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.hub import core_bundle
from nanochat_pl.data.hub.core_bundle import bundle_in_cache, fetch_eval_bundle

FILES = {"core.yaml": "icl_tasks: []\n", "eval_meta_data.csv": "a\n", "eval_data/deep/set.jsonl": "{}\n" * 1000}


def archive(files: dict[str, str] | None = None, folder: str = "eval_bundle/", links: tuple[str, ...] = ()) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as written:
        for name, text in (FILES if files is None else files).items():
            written.writestr(f"{folder}{name}", text)
        for name in links:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            written.writestr(entry, "/etc/passwd")
    return data.getvalue()


def nameless() -> bytes:
    """An archive with an entry whose name is empty, which Python's own writer refuses to make at once."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as written:
        (entry := zipfile.ZipInfo("x")).filename = ""
        with written.open(entry, "w") as file:
            file.write(b"x")
    return data.getvalue()


class Server:
    """Gives what it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        server = self
        self.body, self.status, self.num_asked = b"", 200, 0
        self.failures = 0  # requests that are answered with 503 first
        self.promised: int | None = None

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.num_asked += 1
                status = 503 if server.num_asked <= server.failures else server.status
                self.send_response(status)
                self.send_header("Content-Length", str(server.promised or len(server.body)))
                self.end_headers()
                self.wfile.write(server.body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/eval_bundle.zip"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    yield made
    made.close()


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder", ["eval_bundle/", ""])
def test_it_is_fetched_once(server: Server, tmp_path: Path, folder: str) -> None:
    server.body = archive(folder=folder)
    cache = tmp_path / "new" / "cache"
    assert fetch_eval_bundle(cache, server.url) == (bundle_in_cache(cache), True)
    assert contents(bundle_in_cache(cache)) == FILES
    assert fetch_eval_bundle(cache, server.url) == (bundle_in_cache(cache), False) and server.num_asked == 1
    assert [path.name for path in cache.iterdir()] == ["eval_bundle"], "nothing else is left"


def test_a_refresh_replaces_it(server: Server, tmp_path: Path) -> None:
    server.body = archive()
    fetch_eval_bundle(tmp_path, server.url)
    server.body = archive(FILES | {"core.yaml": "new"})
    assert fetch_eval_bundle(tmp_path, server.url, refresh=True)[1]
    assert contents(bundle_in_cache(tmp_path))["core.yaml"] == "new" and len(list(tmp_path.iterdir())) == 1


def test_what_may_pass_is_tried_again(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.body, server.failures = archive(), 2
    assert fetch_eval_bundle(tmp_path, server.url)[1]
    assert "error 503; trying again in 1 s" in capsys.readouterr().out.replace("\n", " ")


def change(**settings: object) -> Callable[[Server], None]:
    return lambda server: server.__dict__.update(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"status": 404}, "answers with error 404"),
        ({"failures": 9}, "answers with error 503"),
        ({"body": archive()[:-100]}, "is no whole zip archive"),
        ({"body": b"<html>log in</html>"}, "is no whole zip archive"),
        ({"promised": 10**5}, "cannot be reached"),
        ({"body": archive({"core.yaml": ""})}, "holds no evaluation bundle"),
        ({"body": archive(FILES | {"../../out": "x"})}, "leads out of the folder"),
        ({"body": archive(FILES | {"/out": "x"}, folder="")}, "leads out of the folder"),
        ({"body": archive(FILES | {"C:\\out": "x"}, folder="")}, "leads out of the folder"),
        ({"body": archive(links=("eval_bundle/eval_data/link.jsonl",))}, "is no plain file"),
        ({"body": archive(FILES | {"CORE.yaml": "x"})}, "two files of one name"),
        ({"body": archive(FILES | {"./core.yaml": "x"})}, "two files of one name"),
        ({"body": nameless()}, "a file without a name, ''"),
        ({"body": archive(FILES | {".": "x"}, folder="")}, "a file without a name, '.'"),
        ({"body": archive(FILES | {"n" * 256: "x"})}, r"'eval_bundle/n{68}…' cannot be unpacked"),
        ({"body": archive(FILES | {"é" * 200: "x"})}, "cannot be unpacked"),
        ({"body": archive(FILES | {"n" * 65_000: "x"})}, r"n…' is too long a name"),
        ({"body": archive(FILES | {"n/" * 5_000 + "n": "x"})}, "is too long a name"),
        ({"body": archive(FILES | {"eval_data": "x"})}, "'eval_bundle/eval_data' is a file and a folder"),
        ({"body": archive(FILES | {"core.yaml/x": "x"})}, "'eval_bundle/core.yaml' is a file and a folder"),
        ({"body": archive(FILES | {"Core.yaml/": ""})}, "'eval_bundle/core.yaml' is a file and a folder"),
        ({"body": archive(FILES | {f"eval_data/{n}": "" for n in range(1100)})}, "more than 1,000"),
    ],
)
def test_what_is_wrong_leaves_what_was_there(
    server: Server, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    server.body = archive()
    change(**settings)(server)
    old = bundle_in_cache(tmp_path)
    old.mkdir()
    (old / "mine").write_text("old")
    with pytest.raises(UserError, match=message):
        fetch_eval_bundle(tmp_path, server.url, refresh=True)
    assert contents(tmp_path) == {"eval_bundle/mine": "old"}, "and nothing half-written"


def test_a_disk_without_room_for_it_is_said_before(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = archive()
    monkeypatch.setattr(core_bundle, "free_bytes", lambda path: 1)
    with pytest.raises(UserError, match=r"unpacks to 0 MiB, and 0 MiB are free"):
        fetch_eval_bundle(tmp_path, server.url)
    assert not list(tmp_path.iterdir())


def test_an_archive_that_never_ends(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_bundle, "MAX_ARCHIVE_BYTES", 1000)
    server.body = bytes(2000)
    with pytest.raises(UserError, match="has more than"):
        fetch_eval_bundle(tmp_path, server.url)
    assert not list(tmp_path.iterdir())


def test_a_small_archive_does_not_unpack_to_a_large_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_bundle, "MAX_UNPACKED_BYTES", 10**6)
    server.body = archive(FILES | {"eval_data/bomb": "0" * 10**7})
    assert len(server.body) < 10**5
    with pytest.raises(UserError, match="would unpack to"):
        fetch_eval_bundle(tmp_path, server.url)
    assert not list(tmp_path.iterdir())


def test_an_entry_with_more_bytes_than_it_says_is_refused(server: Server, tmp_path: Path) -> None:
    size = len(FILES["eval_data/deep/set.jsonl"]).to_bytes(4, "little")
    assert archive().count(size) == 2, "in the entry's head and in the list of entries"
    server.body = archive().replace(size, (10).to_bytes(4, "little"))
    with pytest.raises(UserError, match="is no whole zip archive"):
        fetch_eval_bundle(tmp_path, server.url)
    assert not list(tmp_path.iterdir())


def test_a_damaged_entry_is_found(server: Server, tmp_path: Path) -> None:
    with zipfile.ZipFile(data := io.BytesIO(), "w", zipfile.ZIP_STORED) as written:
        for name, text in FILES.items():
            written.writestr(name, text)
    server.body = data.getvalue().replace(b"icl_tasks", b"icl_tasky")
    with pytest.raises(UserError, match="is no whole zip archive"):
        fetch_eval_bundle(tmp_path, server.url)
    assert not list(tmp_path.iterdir())


def test_a_damaged_entry_of_another_compression_is_found(server: Server, tmp_path: Path) -> None:
    with zipfile.ZipFile(data := io.BytesIO(), "w", zipfile.ZIP_LZMA) as written:
        written.writestr("eval_bundle/core.yaml", "icl_tasks: []\n" * 1000)
    begin = len("eval_bundle/core.yaml") + 30 + 9  # behind the entry's head and that of LZMA
    body = data.getvalue()
    server.body = body[:begin] + b"\xff" * 20 + body[begin + 20 :]
    with pytest.raises(UserError, match="is no whole zip archive"):
        fetch_eval_bundle(tmp_path, server.url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only")])
def test_a_disk_that_takes_no_archive_is_that_of_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    """It was said to be the disk of the hub's cache."""
    server.body, opened = archive(), Path.open

    def fails(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "wb":
            raise OSError(number, os.strerror(number))
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UserError, match=said) as raised:
        fetch_eval_bundle(tmp_path, server.url)
    assert raised.value.problems[0].startswith(str(tmp_path)) and "paths.cache=" in raised.value.fix
    assert "core.path" not in raised.value.fix and server.num_asked == 1 and not list(tmp_path.iterdir())


def test_without_a_network_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match="cannot be reached: ") as raised:
        fetch_eval_bundle(tmp_path, "http://127.0.0.1:9/eval_bundle.zip")
    assert "core.path=FOLDER" in raised.value.fix and not list(tmp_path.iterdir())
