"""Engine.generate: the golden continuations, equality with a slow generator, sampling, ends, errors."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine
from nanochat_pl.tools.calculator import evaluate
from tests.helpers.small_engine import SmallBundle, byte_tokenizer, golden_bundle, mark, scripted_bundle
from tests.reference.generator import generate_greedily


@pytest.fixture
def engine(golden) -> Engine:
    return Engine(golden_bundle(golden))


def ragged_prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths, some of one token, some longer than the short window."""
    generator = torch.Generator().manual_seed(7)
    lengths = [1, 150, 3, 40, 129, 17, 260, 2, 90][:count]
    return [[991, *torch.randint(0, 991, (length - 1,), generator=generator).tolist()] for length in lengths]


@pytest.mark.parametrize("max_batch", [1, 2, None])
@pytest.mark.parametrize("tools", [True, False])
def test_golden_continuations(engine, golden, max_batch, tools):
    cases = json.loads((golden / "generation.json").read_text(encoding="utf-8"))
    prompts = [case["prompt_ids"] for case in cases]
    results = engine.generate(prompts, max_tokens=cases[0]["max_tokens"], max_batch=max_batch, tools=tools)
    assert [result.ids for result in results] == [case["greedy_ids"] for case in cases]
    assert {result.finish_reason for result in results} == {"length"}


def test_batches_with_reused_slots_equal_the_slow_generator(engine):
    tokenizer = engine.tokenizer
    # Common tokens of this model as stops: rows finish at different times, and others take their slots.
    stops = {833, 711, 705, 340}

    def calculate(expression: list[int]) -> list[int] | None:
        result = evaluate(tokenizer.decode(expression))
        return None if result is None else tokenizer.encode(result)

    prompts = ragged_prompts(9)
    expected = [
        generate_greedily(engine.net, prompt, 20, stops, tokenizer.special_ids, calculate) for prompt in prompts
    ]
    assert len({len(ids) for ids, _ in expected}) > 1, "all rows finish together: this test would prove little"
    for max_batch in (1, 2, 4, 9):
        results = engine.generate(prompts, max_tokens=20, stop_ids=stops, max_batch=max_batch)
        for result, (ids, logprobs) in zip(results, expected, strict=True):
            assert result.ids == ids
            assert result.logprobs == pytest.approx(logprobs, abs=1e-4)
            assert result.finish_reason == ("stop" if ids[-1] in stops else "length")


def test_a_sample_does_not_depend_on_its_neighbours(engine):
    prompts = ragged_prompts(6)
    settings = {"max_tokens": 12, "temperature": 1.0, "top_k": 50, "seed": 3, "stop_ids": [833]}
    together = engine.generate(prompts, **settings)
    assert [r.ids for r in engine.generate(prompts, max_batch=1, **settings)] == [r.ids for r in together]
    assert engine.generate(prompts[:1], **settings)[0].ids == together[0].ids


def test_every_row_draws_its_own_first_token(engine):
    """48: the first sampled token was shared by all rows."""
    results = engine.generate([[991, 79]] * 32, max_tokens=1, temperature=1.0)
    assert len({result.ids[0] for result in results}) > 10


def test_seeds(engine):
    """29: seeds 1 and -1 gave the same numbers."""

    def sample(seed: int) -> list[int]:
        return engine.generate([[991]], max_tokens=16, temperature=1.0, seed=seed)[0].ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(-1)
    assert sample(1) != sample(2)


def test_top_k_bounds(engine):
    """49: top_k=0 crashed."""
    prompts = ragged_prompts(3)
    unlimited = [r.ids for r in engine.generate(prompts, max_tokens=8, temperature=1.0)]
    for top_k in (0, 1000, 5000):
        assert [r.ids for r in engine.generate(prompts, max_tokens=8, temperature=1.0, top_k=top_k)] == unlimited
    greedy = [r.ids for r in engine.generate(prompts, max_tokens=8)]
    assert [r.ids for r in engine.generate(prompts, max_tokens=8, temperature=1.0, top_k=1)] == greedy
    assert [r.ids for r in engine.generate(prompts, max_tokens=8, temperature=1e-8)] == greedy


def test_log_probabilities_are_of_the_plain_softmax(engine):
    """60: a policy gradient on probabilities of another distribution than the model's."""
    prompt = [991, 79, 968]
    result = engine.generate([prompt], max_tokens=10, temperature=0.7, top_k=20)[0]
    ids = torch.tensor([prompt + result.ids])
    with torch.no_grad():
        table = engine.net(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = table.gather(-1, torch.tensor(result.ids)[:, None])[:, 0]
    assert result.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_tool_answers():
    bundle = scripted_bundle(
        {
            # The model would have written 99; the result of the calculator is forced over it.
            "multiply": "So <|python_start|>2*21<|python_end|><|output_start|>99<|output_end|>it is.",
            "refused": "<|python_start|>import os<|python_end|>no.",
        }
    )
    engine = Engine(bundle)
    render = bundle.tokenizer.render_for_completion
    prompts = [render({"messages": [{"role": "user", "content": text}]}) for text in ("multiply", "refused")]
    multiply, refused = engine.generate(prompts)
    expected = "So <|python_start|>2*21<|python_end|><|output_start|>42<|output_end|>it is.<|assistant_end|>"
    assert multiply.ids == mark(expected)
    assert [i for i, forced in zip(multiply.ids, multiply.forced, strict=True) if forced] == mark(
        "<|output_start|>42<|output_end|>"
    )
    assert multiply.text == "So it is."
    assert refused.ids == mark("<|python_start|>import os<|python_end|>no.<|assistant_end|>")
    assert not any(refused.forced)
    without = engine.generate(prompts, tools=False)[0]
    assert without.ids == mark(expected.replace("42", "99"))


def test_forced_tokens_count_as_new_tokens():
    bundle = scripted_bundle({"1": "<|python_start|>1+1<|python_end|><|output_start|>0<|output_end|>!"})
    prompt = bundle.tokenizer.render_for_completion({"messages": [{"role": "user", "content": "1"}]})
    result = Engine(bundle).generate([prompt], max_tokens=6)[0]
    assert result.ids == mark("<|python_start|>1+1<|python_end|><|output_start|>")
    assert result.finish_reason == "length"


def test_the_context_ends_an_answer():
    bundle = scripted_bundle({"go": "x" * 4000})
    reach = bundle.net.config.rotary_reach
    prompt = bundle.tokenizer.render_for_completion({"messages": [{"role": "user", "content": "go"}]})
    result = Engine(bundle).generate([prompt], max_tokens=10_000)[0]
    assert result.finish_reason == "context"
    assert len(prompt) + len(result.ids) == reach


def test_the_model_may_be_used_up_to_its_last_position(engine):
    """The last token of an answer is never run, so nothing of it needs a place in the cache."""
    reach = engine.net.config.rotary_reach
    prompt = [991] * (reach - 2)
    assert engine.generate([prompt], max_tokens=5)[0].finish_reason == "context"


def test_progress_and_nothing_to_do(engine):
    seen = []
    engine.generate(
        ragged_prompts(5), max_tokens=3, max_batch=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[991], []], {}, "prompts[1] is empty"),
        ([[1000]], {}, "outside 0 … 999"),
        ([[-1]], {}, "outside 0 … 999"),
        ([[991] * 5120], {}, "5,120 tokens"),
        ([[991]], {"temperature": -0.1}, "temperature=-0.1"),
        ([[991]], {"temperature": math.nan}, "temperature=nan"),
        ([[991]], {"top_k": -1}, "top_k=-1"),
        ([[991]], {"max_tokens": 0}, "max_tokens=0"),
        ([[991]], {"max_batch": 0}, "max_batch=0"),
        ([[991]], {"stop_texts": "abc"}, "stop_texts='abc'"),
        ([[991]], {"seeds": [1, 2]}, "2 for 1 prompts"),
    ],
)
def test_what_cannot_be_done_is_said(engine, prompts, settings, words):
    with pytest.raises(UserError) as error:
        engine.generate(prompts, **settings)
    assert words in str(error.value)


def test_an_engine_needs_the_model_s_tokenizer(golden):
    net = golden_bundle(golden).net
    with pytest.raises(UserError, match="no tokenizer"):
        Engine(SmallBundle(net, None))
    with pytest.raises(UserError, match="265 ids, the model 1,000"):
        Engine(SmallBundle(net, byte_tokenizer()))


def test_a_stop_text_ends_an_answer_wherever_its_tokens_end(engine):
    prompts, stops = ragged_prompts(4), ["Eheser", "ind A", "tance<|output_start|>", "ind AA"]

    def text(ids: list[int]) -> str:
        return engine.tokenizer.decode([each for each in ids if each < engine.tokenizer.bos_id])

    free = engine.generate(prompts, max_tokens=24, tools=False)
    stopped = engine.generate(prompts, max_tokens=24, tools=False, stop_texts=stops, max_batch=2)
    found = [min((text(each.ids).find(stop) for stop in stops if stop in text(each.ids)), default=-1) for each in free]
    # Within an answer, at the border of a token, and not at all: what looks like a special token is none.
    assert [place >= 0 for place in found] == [False, True, True, False]
    assert "tance<|output_start|>" in engine.tokenizer.decode(free[3].ids)
    for result, whole, place in zip(stopped, free, found, strict=True):
        assert result.ids == whole.ids[: len(result.ids)]
        if place < 0:
            assert (result.finish_reason, len(result.ids)) == ("length", 24)
        else:
            assert result.finish_reason == "stop"
            assert any(stop in text(result.ids) for stop in stops)
            assert not any(stop in text(result.ids[:-1]) for stop in stops)
    with pytest.raises(UserError, match="an empty one"):
        engine.generate(prompts, stop_texts=[""])


def test_processes_that_share_prompts_draw_as_one_would(engine):
    prompts = [[991, 5]] * 4
    whole = engine.generate(prompts, max_tokens=8, temperature=1.0, seed=3)
    halves = [
        engine.generate(prompts[n::2], max_tokens=8, temperature=1.0, seed=3, indices=range(n, 4, 2)) for n in (0, 1)
    ]
    assert [result.ids for result in whole] == [halves[n % 2][n // 2].ids for n in range(4)]
    assert len({tuple(result.ids) for result in whole}) == 4
