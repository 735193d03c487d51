"""The process that generates, in this one."""

from __future__ import annotations

from multiprocessing import Pipe

from nanochat_pl.serving.worker import Worker
from tests.helpers.evaluated import make_run


def test_what_it_is_started_with_reaches_the_scheduler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = make_run("demo")
    spec = {"bundle": str(bundle), "device": "cpu", "num_slots": 3, "max_context": 64, "prefill_chunk": 7}
    scheduler = Worker(Pipe()[0], spec)._scheduler
    assert (scheduler.num_slots, scheduler.max_context, scheduler.prefill_chunk) == (3, 64, 7)
