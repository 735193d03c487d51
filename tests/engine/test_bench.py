"""What `bench` says follows from what it measures, and no answer is shorter than it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine, bench
from nanochat_pl.engine.bench import Limits, bytes_of_step, limits_of, measure_batch, random_prompts
from nanochat_pl.engine.settings import BenchSettings
from tests.helpers.models import perturbed, tiny_config
from tests.helpers.small_engine import SmallBundle, byte_tokenizer

BUNDLE = Path(__file__).parents[1] / "regressions" / "run_of_6b9f64f" / "runs" / "finished" / "base" / "bundle"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(SmallBundle(perturbed(tiny_config(vocab_size=265)).eval(), byte_tokenizer()))


def test_the_figures_follow_from_the_seconds(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 s until the first token, then 0.01, 0.02 and 0.03 s a step; the first measurement is thrown away."""
    steps = iter([9.0, 0.01, 0.03, 0.02])

    def seconds(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
        assert [len(prompt) for prompt in prompts] == [7] * 4 and len({*map(tuple, prompts)}) == 4
        return 0.5 if new_tokens == 1 else 0.5 + 10 * next(steps)

    monkeypatch.setattr(bench, "_seconds_of_answers", seconds)
    settings = BenchSettings(prompt_tokens=7, new_tokens=11, repeats=3)
    found = measure_batch(engine, settings, 4, Limits(bytes_per_second=1e9, flops_per_second=1e9))
    assert found.first_token_ms.median == pytest.approx(500)
    token = found.token_ms
    assert (token.median, token.least, token.most, token.n) == pytest.approx((20, 10, 30, 3))
    assert found.tokens_per_second.median == pytest.approx(4 / 0.02)
    net = engine.net.config
    linears = net.num_layers * (net.width * (2 * 48 + 2 * 16) + 8 * net.width**2) + 265 * net.width
    gates = len(net.value_embedding_layers) * net.value_gate_channels * net.num_kv_heads
    padded = (net.padded_vocab_size - 265) * net.width
    assert found.product_share == pytest.approx(2 * (linears + gates + padded) * 4 / 0.02 / 1e9)
    assert found.bandwidth_share == pytest.approx(bytes_of_step(engine, 4, 12) / 0.02 / 1e9)


def test_real_answers_have_their_whole_length_and_a_quantized_step_reads_less(engine: Engine) -> None:
    settings = BenchSettings(prompt_tokens=5, new_tokens=4, repeats=1)
    found = measure_batch(engine, settings, 3, Limits(1e9, 1e9))
    assert 0 < found.token_ms.median < 1e4 and found.tokens_per_second.n == 1
    rough = Engine(SmallBundle(perturbed(tiny_config(vocab_size=265)).eval(), byte_tokenizer()), quantize="int8")
    assert bytes_of_step(rough, 3, 9) < bytes_of_step(engine, 3, 9)
    assert random_prompts(engine, [3, 2]) == random_prompts(engine, [3, 2])


def test_longer_than_the_model_can_be_is_refused(engine: Engine) -> None:
    settings = BenchSettings(prompt_tokens=300, new_tokens=21)
    with pytest.raises(UserError, match=r"prompt_tokens=300, new_tokens=21: together .* 320 positions"):
        measure_batch(engine, settings, 1, Limits(1e9, 1e9))
    with pytest.raises(UserError, match="nothing to measure"):
        BenchSettings(batch_sizes=())


def test_the_command_ends_with_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"bundle={BUNDLE}", "batch_sizes=[1,3]", "prompt_tokens=4", "new_tokens=3", "repeats=2"]
    assert main(["bench", *arguments, "quantize=int8", "dtype=float32", "accelerator=cpu"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["dtype"], found["quantize"], found["prompt_tokens"]) == ("float32", "int8", 4)
    assert [batch["batch_size"] for batch in found["batches"]] == [1, 3]
    for batch in found["batches"]:
        assert batch["tokens_per_second"]["n"] == 2 and batch["bandwidth_share"] > 0
    assert any("tokens/s" in line for line in shown)


@pytest.mark.parametrize(("seconds", "size"), [(0.001, 1024), (0.02, 256)])
def test_a_type_in_which_products_are_slow_is_measured_on_small_ones(monkeypatch, seconds, size):
    """A CPU without bfloat16 took 27 seconds for those of the usual size."""
    monkeypatch.setattr(bench, "_seconds", lambda work, device: seconds)
    assert limits_of(torch.device("cpu"), torch.bfloat16).flops_per_second == 2 * size**3 / seconds
