"""The process that generates, in this one."""

from __future__ import annotations

from multiprocessing import Pipe

import pytest

from nanochat_pl.serving.worker import Worker
from tests.helpers.evaluated import make_run


def test_what_it_is_started_with_reaches_the_scheduler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = make_run("demo")
    spec = {"bundle": str(bundle), "device": "cpu", "num_slots": 3, "max_context": 64, "prefill_chunk": 7}
    scheduler = Worker(Pipe()[0], spec)._scheduler
    assert (scheduler.num_slots, scheduler.max_context, scheduler.prefill_chunk) == (3, 64, 7)


@pytest.mark.slow
def test_compile_reaches_the_engine_and_is_done_before_the_first_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = {"bundle": str(make_run("demo")), "device": "cpu", "num_slots": 2, "max_context": 64, "prefill_chunk": 8}
    worker = Worker(Pipe()[0], spec | {"compile": True})
    assert len(worker._engine._compiled._graphs) == 2
    assert Worker(Pipe()[0], spec)._engine._compiled is None
