"""The decode step of CUDA graphs: its shapes, its memory and its arithmetic on the CPU, where nothing is recorded."""

from __future__ import annotations

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine
from nanochat_pl.model import graph_decode
from nanochat_pl.model.graph_decode import GraphDecode
from nanochat_pl.model.inference import InferenceGPT
from tests.engine.test_scheduler import CONTEXT, greedy_answers, small_engine
from tests.helpers.small_engine import SmallBundle, byte_tokenizer


def with_graphs(eager: Engine) -> Engine:
    """An engine with the same network, as one on a GPU would decode."""
    assert isinstance(eager.net, InferenceGPT)
    engine = Engine(SmallBundle(eager.net._source[0], byte_tokenizer()))
    assert isinstance(engine.net, InferenceGPT)
    engine._compiled = GraphDecode(engine.net)
    return engine


def test_rows_that_come_and_go_get_the_answers_of_an_eager_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one row to all slots, over several ranges of keys; prefixes in slots that were padding are used again; and
    after the weights have changed."""
    monkeypatch.setattr(graph_decode, "MIN_KEYS", 32)
    eager = small_engine("float32")
    engine, shapes = with_graphs(eager), set()
    for seed in (0, 1):
        for ours, theirs in zip(greedy_answers(engine, seed), greedy_answers(eager, seed), strict=True):
            assert (ours.ids, ours.finish_reason) == (theirs.ids, theirs.finish_reason)
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        shapes |= set(engine._compiled._steps)
        with torch.no_grad():
            for parameter in eager.net._source[0].parameters():
                parameter.mul_(1.05)
    assert {rows for rows, _ in shapes} <= {1, 2, 4, 7} and len({rows for rows, _ in shapes}) >= 3
    assert len({keys for _, keys in shapes}) >= 2 and {keys for _, keys in shapes} <= {32, 64, 128, CONTEXT}


def test_what_graphs_were_made_for_decides_how_long_they_are_kept() -> None:
    """The same memory with the same weights: yes. Other weights, noticed or told of, or another cache: they are made
    again, and the old ones are let go."""
    engine = with_graphs(small_engine("float32"))
    cache, graphs = engine.new_cache(2, CONTEXT), engine._compiled
    engine.logits(cache, [[1, 2, 3], [4]])
    kept = []
    for change in (None, None, "in place", None, "told of"):
        if change == "in place":
            with torch.no_grad():
                engine.net._source[0].lm_head.weight.mul_(0.5)
        elif change == "told of":
            engine.refresh()
        engine.logits(cache, [[5], [6]])
        kept.append(next(iter(graphs._steps.values())))
    assert kept[0] is kept[1] is not kept[2] is kept[3] is not kept[4]
    assert graphs._made_for[0] is cache.memory
    engine.new_cache(2, CONTEXT)
    assert not graphs._steps and graphs._made_for is None and graphs._pool is None


def test_slots_that_are_read_behind_the_running_ones_are_not_given_to_a_graph() -> None:
    engine = with_graphs(small_engine("float32"))
    cache = engine.new_cache(4, CONTEXT)
    engine.logits(cache, [[1, 2]] * 4)
    assert engine._compiled.fits(cache.rows(0, 2)) and not engine._compiled.fits(cache.rows(1, 3))
    cache.reset([0])
    assert not engine._compiled.fits(cache)


def test_what_cannot_be_recorded_ends_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "current_stream", fail)
    engine = with_graphs(small_engine("float32"))
    engine.generate([[1, 2, 3]], max_tokens=2, stop_ids=(), tools=False)
    (step,) = engine._compiled._steps.values()
    with pytest.raises(
        UserError, match="compile=true: CUDA graphs do not work here: operation not permitted"
    ) as caught:
        engine._compiled._record(step)
    assert "more" not in str(caught.value)
    assert not engine._compiled._steps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_graphs_write_what_kernels_do(dtype: str) -> None:
    bundle = SmallBundle(small_engine(dtype).net._source[0].to("cuda"), byte_tokenizer())
    eager, engine = Engine(bundle), Engine(bundle, compile=True)
    assert isinstance(engine._compiled, GraphDecode)
    for seed in (0, 1):
        for ours, theirs in zip(greedy_answers(engine, seed), greedy_answers(eager, seed), strict=True):
            if dtype == "float32":
                assert ours.ids == theirs.ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
            else:  # a choice between two that are nearly equal may fall otherwise
                assert ours.logprobs[:2] == pytest.approx(theirs.logprobs[:2], abs=0.2)
