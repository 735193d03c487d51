"""Files of a hub that are fetched when they are read, and a few ahead of that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.hub.download import fetch_file
from nanochat_pl.data.hub.manifest import HubFile, Manifest
from nanochat_pl.data.sources.local import FileDocuments

FILES_AHEAD = 4
A = TypeVar("A")


@dataclass(frozen=True)
class DocumentsOnDemand:
    """Calling it fetches a file where it is not here, verified, and gives its documents. It can be sent to another
    process.

    Attributes:
        documents: of the file, whose own path and hash are taken when it is here.
        fix: what a person can do where it cannot be fetched.
    """

    documents: FileDocuments
    manifest: Manifest
    file: HubFile
    cache_dir: Path
    fix: str

    def fetch(self) -> tuple[HubFile, Path]:
        """Have the file here.

        Raises:
            UserError: it cannot be fetched.
        """
        try:
            return fetch_file(self.manifest, self.file, self.cache_dir)
        except UserError as error:
            raise UserError(error.problems, f"{self.fix} {error.fix}") from error

    def __call__(self) -> Iterator[str]:
        file, path = self.fetch()
        return replace(self.documents, path=path, sha256=file.sha256)()


def fetched_ahead(
    items: Iterable[A], fetch: Callable[[A], object], ahead: int = FILES_AHEAD
) -> Generator[A, None, None]:
    """The items, one after the other, while what the following ones need is fetched.

    What cannot be fetched is no error here: whoever reads it tries again, and says what is wrong.

    Args:
        fetch: has what an item needs on the disk.
        ahead: items that it is called for before their turn; as many downloads are under way at a time.
    """

    def try_to_fetch(item: A) -> None:
        with suppress(UserError):
            fetch(item)

    waiting: deque[tuple[A, Future[None]]] = deque()
    threads = ThreadPoolExecutor(ahead)
    try:
        for item in items:
            waiting.append((item, threads.submit(try_to_fetch, item)))
            if len(waiting) > ahead:
                yield waiting.popleft()[0]
        while waiting:
            yield waiting.popleft()[0]
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
