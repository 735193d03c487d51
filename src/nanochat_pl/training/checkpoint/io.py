"""How a checkpoint is written and read: whole or not there, and while the training goes on."""

from __future__ import annotations

import contextlib
import errno
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.common.files import FREE_SPACE, free_bytes, write_atomically
from nanochat_pl.common.out_of_memory import is_out_of_memory

# Of CheckpointIO's storage_options: write in the background.
IN_BACKGROUND = "in background"


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there: written beside their place, synced, read back, renamed.

    Reading back finds what went wrong on the way to the operating system: it gives the bytes that it keeps in memory.
    What a disk loses is found at the next start, which verifies each file that it might use.

    Attributes:
        failure: why one was not written, until :meth:`raise_failure`. It is raised by :class:`ResumeFiles`, on all
            processes: where Lightning calls this class, the others are waiting for the main process.
    """

    failure: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``. Where that cannot be, older files are untouched and ``failure`` is set."""
        path = Path(path)
        try:
            _require_space(checkpoint, path)
            write_atomically(
                path, lambda temporary: _write(checkpoint, temporary, path), lambda temporary: _verify(temporary, path)
            )
        except UserError as error:
            self.failure = error

    def raise_failure(self) -> None:
        """Raise ``failure`` once, where there is one."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; its tensors stay on the disk until they are copied into place."""
        with unreadable_explained(path):
            return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Copies a checkpoint to host memory and writes it in a thread, while the training goes on. One at a time.

    Not Lightning's ``AsyncCheckpointIO``: that copies on the device, queues any number of copies, raises at a later
    save in the main process alone, and does not say whether it is done. What it is asked for without
    ``storage_options=IN_BACKGROUND`` is written before it returns, as callbacks of others expect.

    Attributes:
        gathered: parts of a checkpoint that were put together for the file, in host memory: nobody else has them, so
            they are not copied once more.
    """

    def __init__(self) -> None:
        self.gathered: tuple[str, ...] = ()
        self._thread: threading.Thread | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a file is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """As in the base class, after the file before is done. ``failure`` may be set later than this returns."""
        self.wait()
        if storage_options != IN_BACKGROUND:
            super().save_checkpoint(checkpoint, path)
            return
        try:
            copy = copy_to_host(checkpoint, self.gathered)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            super().save_checkpoint(checkpoint, path)  # without a copy, while the training waits
            return
        # Not a daemon: Python waits for it at its end, whatever the end is.
        self._thread = threading.Thread(target=self._save, args=(copy, path), name="resume file")
        self._thread.start()

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        """In the thread; whatever it is, the main thread raises it."""
        try:
            super().save_checkpoint(checkpoint, path)
        except BaseException as error:
            self.failure = error

    def wait(self) -> None:
        """Wait until nothing is written any more. Signals are heard meanwhile."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def teardown(self) -> None:
        """Lightning's end of a fit, also after an error."""
        self.wait()


def copy_to_host(checkpoint: dict[str, Any], kept: Sequence[str] = ()) -> dict[str, Any]:
    """The same with tensors of its own in host memory, which later steps do not change; some parts as they are."""
    return {
        key: value if key in kept else tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), value)
        for key, value in checkpoint.items()
    }


def _require_space(checkpoint: dict[str, Any], path: Path) -> None:
    needed = sum(leaf.nbytes for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor))
    if needed > (free := free_bytes(path)):
        raise UserError(
            f"{path}: takes {needed / 2**20:,.1f} MiB, and the disk has {free / 2**20:,.1f} MiB free;"
            " the older files are whole.",
            fix=f"{FREE_SPACE} Then the same command goes on.",
        )


def _write(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    try:
        torch.save(checkpoint, temporary)
    except RuntimeError as error:  # what torch's zip writer raises where the disk is full
        raise UserError(
            f"{path}: could not be written ({free_bytes(path) / 2**20:,.1f} MiB free on the disk): {first_line(error)}",
            fix=f"{FREE_SPACE} Then the same command goes on.",
        ) from error


def _verify(temporary: Path, path: Path) -> None:
    if (problem := wrong_bytes(temporary)) is not None:
        raise UserError(f"{path}: what was written cannot be read back: {problem}.", fix="Check the disk.")


@contextlib.contextmanager
def unreadable_explained(path: Path) -> Iterator[None]:
    """Tell a file that cannot be read from one that is damaged: nothing is known of its bytes."""
    try:
        yield
    except (OSError, MemoryError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error) or "out of memory"
        raise UserError(
            f"{path}: cannot be read: {why}.",
            fix="Nothing was changed. Where the disk, the network or its permissions are to blame, put that right, and"
            " the same command goes on. Without this file it goes on from an older one.",
        ) from error


def wrong_bytes(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint: None where each one's checksum is right."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
        except Exception as error:  # wrong bytes become whatever zipfile, zlib and all that they call make of them
            # EINVAL: the archive's own table points to before the file's begin.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            return first_line(error)
    return f"{broken} is damaged" if broken else None
