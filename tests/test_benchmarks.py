"""Each benchmark at a toy size: it runs, and its last line says what was measured, where and how often."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.evaluated import make_run
from tests.helpers.forked import run_forked

FOLDER = Path(__file__).parents[1] / "benchmarks"
QUICK = {
    "bench_engine": "--repeats 1 --new-tokens 3",
    "check_comparison": "20",
    "chat_turns": "runs/it/sft/bundle --chats 2 --turns 2 --tasks arithmetic spelling",
}
SLOW = {
    "bench_data": "text.txt --repeats 1 --vocab-size 300 --tokens 16384 --memory-rows 64",
    "bench_step": "--shape toy --rounds 1 --steps 2 --eager",
    "bench_attention": "--length 64 --window 16 --rows 1 --rounds 2",
    "bench_plan_memory": "--toy",
    "bench_server": "--streams 2 --turns 2 --repeats 1 --new-tokens 3 --many 2",
    "bench_resume_files": "--files 1 --every-steps 6 --depth 1 --mib-per-second 1000",
    "bench_core": "--repeats 1 --items 2",
    "bench_trainer": "--pairs 4 --depth 1 --eager",
    "early_reduction": "--pairs 2 --depth 1 --vocab 300 --rows 1",
    "bench_processes": "--rounds 1 --steps 2 --depth 1 --step-tokens 512 --device-batch-size 1",
    "bench_startup": "--repeats 1 --experiment tiny data=local data.path=text.txt tokenizer.vocab_size=300",
}


def test_all_are_tried() -> None:
    helpers = {"_report", "peak_memory"}
    assert {path.stem for path in FOLDER.glob("*.py")} - helpers == {*QUICK, *SLOW}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_last_line_says_what_was_measured_where_and_how_often(name: str, here: Path) -> None:
    if name in ("bench_data", "bench_startup"):
        text = "\n\n".join(f"Of {number} words this is one, and {number * number} another." for number in range(3000))
        (here / "text.txt").write_text(text, encoding="utf-8")
    if name == "chat_turns":
        make_run("it")
    command = [str(FOLDER / f"{name}.py"), *{**QUICK, **SLOW}[name].split()]
    done = run_forked(command, cwd=here, env={**os.environ, "TMPDIR": str(here)})
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == name.removeprefix("bench_") and last["n"] >= 1
    assert "cores" in last["machine"] and "PyTorch" in last["machine"]
    assert last["limits"]["copy_bytes_per_second"] > 1e7 and last["limits"]["product_flops_per_second"]["float32"] > 1e7
    assert len(last) > 4, "and what was found"
