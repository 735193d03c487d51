"""An engine with a compiled decode step writes what an eager one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine
from nanochat_pl.model import compiled_decode
from nanochat_pl.model.compiled_decode import CompiledDecode
from nanochat_pl.model.inference import InferenceGPT
from tests.engine.test_scheduler import greedy_answers, small_engine
from tests.helpers.models import perturbed, tiny_config
from tests.helpers.small_engine import SmallBundle, byte_tokenizer


@pytest.fixture(params=["as it is", pytest.param("compiled", marks=pytest.mark.slow)])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's own arithmetic, without a compiler and with one."""
    if request.param == "as it is":
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def bundle_of(engine: Engine) -> SmallBundle:
    assert isinstance(engine.net, InferenceGPT)
    return SmallBundle(engine.net._source[0], byte_tokenizer())


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_come_and_go_get_the_answers_of_an_eager_engine(dtype: str) -> None:
    """Ragged rows, from one to all slots; prefixes are used again; and after the weights have changed."""
    eager = small_engine(dtype)
    bundle = bundle_of(eager)
    engine = Engine(bundle, compile=True)
    for seed in (0, 1):
        for ours, theirs in zip(greedy_answers(engine, seed), greedy_answers(eager, seed), strict=True):
            if dtype == "float32":
                assert (ours.ids, ours.finish_reason) == (theirs.ids, theirs.finish_reason)
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            else:  # a choice between two that are nearly equal may fall otherwise
                assert ours.logprobs[:2] == pytest.approx(theirs.logprobs[:2], abs=0.2)
        with torch.no_grad():
            for parameter in bundle.net.parameters():
                parameter.mul_(1.05)


@pytest.mark.slow
def test_a_compiled_step_is_what_it_takes_itself_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one layer through the real compiler; only steps of one token a row are given to it."""
    bundle = SmallBundle(perturbed(tiny_config(vocab_size=265)).eval(), byte_tokenizer())
    steps, logits = [], CompiledDecode.logits
    monkeypatch.setattr(
        CompiledDecode, "logits", lambda self, cache, ids: steps.append(len(ids)) or logits(self, cache, ids)
    )
    prompts = [[1, 2, 3], [4], [5] * 20]
    found, expected = (
        Engine(bundle, compile=compiled).generate(prompts, max_tokens=5, stop_ids=(), tools=False)
        for compiled in (True, False)
    )
    assert steps == [3] * 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    engine = Engine(bundle, compile=True)
    for number, together in enumerate(found):
        (alone,) = engine.generate([prompts[number]], max_tokens=5, stop_ids=(), tools=False)
        assert alone.ids == together.ids and alone.logprobs == pytest.approx(together.logprobs, abs=1e-5)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = SmallBundle(perturbed(tiny_config(vocab_size=265)).eval(), byte_tokenizer())
    with pytest.raises(UserError, match="compile=true, quantize=int8: one excludes the other"):
        Engine(bundle, quantize="int8", compile=True)
    with pytest.raises(UserError, match="compile=true: is for CPUs and NVIDIA GPUs, and the model is on meta"):
        Engine(SmallBundle(type(bundle.net)(bundle.net.config), byte_tokenizer()), compile=True)

    def without_compiler(function: Any, **_: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("No working C++ compiler found")

        return fail

    def wrong(function: Any, **_: Any) -> Any:
        return lambda *given: tuple(2 * each for each in function(*given))

    for compiler, message in ((without_compiler, "does not run here: No working C"), (wrong, "logits are 1.0e.00 off")):
        monkeypatch.setattr(torch, "compile", compiler)
        with pytest.raises(UserError, match=f"compile=true: .*{message}"):
            Engine(bundle, compile=True).generate([[1, 2]], max_tokens=3, stop_ids=())


def test_a_context_that_is_too_long_for_the_graphs_is_decoded_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_decode, "MAX_KEYS", 1)
    monkeypatch.setattr(CompiledDecode, "logits", None)
    bundle = SmallBundle(perturbed(tiny_config(vocab_size=265)).eval(), byte_tokenizer())
    assert len(Engine(bundle, compile=True).generate([[1, 2]], max_tokens=3, stop_ids=())[0].ids) == 3
