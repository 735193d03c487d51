"""The command `serve` with a tiny model, as a program of its own."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.evaluated import make_run
from tests.helpers.forked import COMMAND, Forked


class Served(NamedTuple):
    """A server that runs.

    Attributes:
        url: without a slash at the end.
        program: its process.
        program_folder: in which it runs.
    """

    url: str
    program: Forked
    program_folder: Path

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a path."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def wait_until(self, path: str, condition: Any, seconds: float = 60.0) -> tuple[int, Any]:
        """Ask until the answer is as wanted."""
        end = time.monotonic() + seconds
        while not condition(*(found := self.get(path))):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found


@contextmanager
def tiny_model_served(folder: Path, *arguments: str) -> Iterator[Served]:
    """A run named demo in the folder, served with one thread."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        make_run("demo")
    finally:
        os.chdir(before)
    with served(folder, "accelerator=cpu", "num_threads=1", *arguments) as running:
        yield running


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[Served]:
    """Start the command in a folder and wait until its models are loaded; at the end it is killed."""
    # What is tested is the server: the compiler would take longer than that.
    program = Forked([*COMMAND, "serve", "port=0", "compile=false", *arguments], cwd=folder, capture=True)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"^API:  (http://\S+)/v1", program.printed()[0], re.M)):
            assert program.poll() is None and time.monotonic() < end, program.printed()
            time.sleep(0.05)
        yield Served(found[1], program, folder)
    finally:
        program.kill()
