"""A training whose output nobody reads any more: a `tee` that has died, a terminal that was closed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nanochat_pl.cli._subprocess import FOLLOW_PARENT
from tests.helpers.forked import COMMAND, Forked
from tests.training.conftest import start_run, tiny_overrides


@contextlib.contextmanager
def training(place: Path, name: str, output: int, *overrides: str) -> Iterator[Forked]:
    """In a session of its own, so that no SIGHUP comes with its terminal's end."""
    start_run(place, name, "base")
    command = [*COMMAND, "train", f"run={name}", *tiny_overrides(place), "max_steps=10", *overrides]
    environment = {key: value for key, value in os.environ.items() if key != FOLLOW_PARENT}
    process = Forked(command, stdout=output, stderr=output, env=environment)
    os.close(output)
    try:
        yield process
    finally:
        process.kill()


def read_until(ours: int, text: bytes) -> None:
    said = b""
    with contextlib.suppress(OSError):  # of a terminal: its other end is closed
        while text not in said and (piece := os.read(ours, 4096)):
            said += piece
    assert text in said, said.decode(errors="replace")


def test_it_trains_to_its_end(place: Path) -> None:
    (pipe, into_pipe), (terminal, into_terminal) = os.pipe(), os.openpty()
    with (
        training(place, "lost-pipe", into_pipe) as one,
        training(place, "lost-terminal", into_terminal) as two,
    ):
        read_until(pipe, b"Training on")
        os.close(pipe)
        read_until(terminal, b"Training on")
        os.close(terminal)
        codes = one.wait(240), two.wait(240)
    assert codes == (0, 0)
    for name in ("lost-pipe", "lost-terminal"):
        assert (place / "runs" / name / "base" / "finished.json").is_file()


def test_what_goes_wrong_has_its_exit_code_all_the_same(place: Path) -> None:
    pipe, into_pipe = os.pipe()
    with training(place, "lost-error", into_pipe, "evaluation.sample_prompts=[]", "data.path=/nowhere") as process:
        os.close(pipe)
        assert process.wait(240) == 2
