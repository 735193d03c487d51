"""The benchmark of a GPU at toy size, and what a plan reads of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.planning.gpus import named_device
from nanochat_pl.planning.measured import measured_mfu

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "bench_gpu.py"
H100 = named_device("h100")


def written(folder: Path, **changes: Any) -> Path:
    parts = {
        "device": {"seconds": 1.0},
        "train_bfloat16": {"mfu": 0.31, "depth": 12, "fp8": False},
        "train_fp8": {"mfu": 0.28, "depth": 12, "fp8": True},
        "train_large_bfloat16": {"mfu": 0.47, "depth": 24, "fp8": False},
        "train_large_fp8": {"unmeasured": "no time was left"},
    }
    whole = {"version": 1, "device": "NVIDIA H100 80GB HBM3", "parts": parts, **changes}
    path = folder / "bench_gpu.json"
    path.write_text(f"NVIDIA H100\n{json.dumps(whole)}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("depth", "fp8", "expected"),
    [(12, False, (0.31, 12, False)), (20, False, (0.47, 24, False)), (26, True, (0.28, 12, True))],
)
def test_the_nearest_depth_and_the_same_products_count(
    tmp_path: Path, depth: int, fp8: bool, expected: tuple[float, int, bool]
) -> None:
    assert measured_mfu(written(tmp_path), H100, depth, fp8) == expected


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 2}, "has version 2; this program reads 1"),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "was measured on NVIDIA A100-SXM4-80GB, and the plan is for h100"),
        ({"parts": {"train_bfloat16": {"unmeasured": "no compiler"}}}, "has no training whose MFU was measured"),
        ({"parts": {"train_bfloat16": {"mfu": 2.0, "depth": 12, "fp8": False}}}, "has no training whose MFU"),
        ({"parts": [1]}, "has no training whose MFU"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        measured_mfu(written(tmp_path, **changes), H100, 12, False)


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "\x00"])
def test_a_file_of_something_else_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="its last line is not what the benchmark writes"):
        measured_mfu(path, H100, 12, False)
    with pytest.raises(UserError, match="cannot be read"):
        measured_mfu(tmp_path / "missing.json", H100, 12, False)


def test_the_plan_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["plan", "model.depth=24", "data=climbmix", "hardware=h100", f"bench={written(tmp_path)}"]
    assert main([*asked, "explain=mfu"]) == 0
    out = capsys.readouterr().out
    assert "mfu = 0.47" in out and "overridden by bench: measured at depth 24; the formula gives 0.4" in out


@pytest.mark.parametrize("part", ["device", "train_bfloat16", "train_fp8", "decode", "attention", "linear"])
def test_each_part_runs_at_toy_size(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import bench_gpu

    threads = torch.get_num_threads()
    monkeypatch.setattr(bench_gpu, "REPEATS", 1)
    found = bench_gpu.run_part(part, toy=True)
    torch.set_num_threads(threads)
    json.dumps(found)
    if part == "train_fp8":
        assert "bfloat16" in found["unmeasured"] or "NVIDIA" in found["unmeasured"]
    elif part == "train_bfloat16":
        assert found["tokens_per_second"] > 0 and found["mfu"]["unmeasured"]
    else:
        assert "unmeasured" not in found
    if part == "decode":
        assert found["2 rows"]["tokens_per_second"]["median"] > 0
    if part == "attention":
        assert found["chosen, window 16"]["median"] > 0 and found["flex, window 63"]["unmeasured"]


def test_a_part_that_fails_or_hangs_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import bench_gpu

    monkeypatch.setitem(bench_gpu.PARTS, "device", lambda size, device: 1 / 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert bench_gpu.run_part("device", toy=True)["unmeasured"] == "ZeroDivisionError: division by zero"
    for code, said in (
        ("import time; time.sleep(9)", "not done after 1 seconds"),
        ("raise SystemExit(3)", "ended with 3"),
    ):
        real = subprocess.run
        with monkeypatch.context() as patched:
            patched.setattr(
                subprocess,
                "run",
                lambda command, code=code, real=real, **options: real([sys.executable, "-c", code], **options),
            )
            assert said in bench_gpu.in_a_process("device", True, 1)["unmeasured"]


@pytest.mark.slow
def test_the_whole_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--toy", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    whole = json.loads(done.stdout.strip().splitlines()[-1])
    assert whole == json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert whole["toy"] and whole["parts"]["train_bfloat16"]["tokens_per_second"] > 0
