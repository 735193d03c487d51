"""What is read out of a model is what the model computes with."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Engine
from nanochat_pl.inspection import (
    draw_attention,
    draw_tokens,
    layer_factors,
    logit_lens,
    logprob_colors,
    nearest_tokens,
    parameter_summaries,
    score_tokens,
    scored_result,
    show_token,
    spectra,
    trace,
)
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.counts import count_parameters
from nanochat_pl.model.gpt import GPT
from nanochat_pl.training.callbacks.evaluation import ModelAndTokenizer
from tests.helpers.models import perturbed, random_ids, tiny_config
from tests.helpers.small_engine import byte_tokenizer


@pytest.fixture(scope="module")
def net() -> GPT:
    """Three layers, windows of 3, grouped heads."""
    return perturbed(tiny_config(depth=3, num_kv_heads=2)).eval()


@pytest.fixture(scope="module")
def model() -> ModelAndTokenizer:
    tokenizer = byte_tokenizer()
    settings = ModelSettings(depth=2, aspect_ratio=16, head_dim=16, sequence_len=64)
    return ModelAndTokenizer(perturbed(resolve_model(settings, tokenizer.vocab_size, "float32")).eval(), tokenizer)


def ids_for(net: GPT, length: int = 12) -> list[int]:
    return random_ids(net.config, 1, length)[0].tolist()


def test_the_last_row_of_the_logit_lens_is_the_prediction(net: GPT) -> None:
    ids = ids_for(net)
    tokens, probabilities = logit_lens(net, trace(net, ids), top=5)
    assert tokens.shape == probabilities.shape == (net.config.num_layers + 1, len(ids), 5)
    expected = net(torch.tensor([ids]))[0].softmax(dim=-1).topk(5)
    assert torch.equal(tokens[-1], expected.indices)
    torch.testing.assert_close(probabilities[-1], expected.values.detach(), atol=1e-6, rtol=1e-5)
    assert not torch.equal(tokens[0], tokens[-1])


def test_attention_keeps_within_its_window_and_adds_up_to_one(net: GPT) -> None:
    assert net.config.windows[0] == 3 and net.config.windows[-1] > 12
    traced = trace(net, ids_for(net))
    for window, weights in zip(net.config.windows, traced.attention, strict=True):
        assert weights.shape == (net.config.num_heads, 12, 12)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(net.config.num_heads, 12))
        distance = torch.arange(12)[:, None] - torch.arange(12)
        assert (weights[:, (distance < 0) | (distance > window)] == 0).all()
        assert (weights[:, (distance >= 0) & (distance <= window)] > 0).all()


def test_a_trace_has_the_stream_and_the_gates_of_the_layers(net: GPT) -> None:
    traced = trace(net, ids := ids_for(net))
    assert traced.residuals.shape == (4, 12, net.config.width)
    torch.testing.assert_close(traced.residuals[0], net.begin(torch.tensor([ids]))[0].detach())
    assert list(traced.gates) == list(net.config.value_embedding_layers)
    for gates in traced.gates.values():
        assert gates.shape == (12, net.config.num_kv_heads)
        assert ((gates > 0) & (gates < net.config.value_gate_scale)).all()
    assert all(not block.attn.ve_gate._forward_hooks for block in net.blocks if hasattr(block.attn, "ve_gate"))


@pytest.mark.parametrize(
    ("ids", "said"), [([], "0 tokens"), ([1] * 513, "513 tokens"), ([1, 999], "ids: must be 0 … 49")]
)
def test_a_trace_refuses_what_the_model_cannot_read(net: GPT, ids: list[int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        trace(net, ids)


def test_summaries_count_every_parameter_once(net: GPT) -> None:
    summaries = {each.role: each for each in parameter_summaries(net)}
    assert sum(each.num_parameters for each in summaries.values()) == count_parameters(net.config)["total"]
    matrix = torch.cat([p.flatten() for name, p in net.named_parameters() if name.startswith("transformer.h.")])
    assert summaries["matrix"].rms == pytest.approx(float(matrix.detach().square().mean().sqrt()), rel=1e-5)
    assert summaries["matrix"].largest == float(matrix.detach().abs().max())


def test_spectra_are_those_of_every_matrix(net: GPT) -> None:
    found = {(each.kind, each.layer): each for each in spectra(net)}
    assert {"wte", "lm_head", "value_embeds", "attn.c_q", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"} <= {
        k for k, _ in found
    }
    weight = net.get_parameter("transformer.h.1.mlp.c_fc.weight").detach()
    values = found["mlp.c_fc", 1].values
    assert float(values.square().sum()) == pytest.approx(float(weight.square().sum()), rel=1e-4)
    assert (values.diff() <= 0).all()
    assert 1 <= found["mlp.c_fc", 1].stable_rank <= len(values)


def test_factors_of_the_layers(net: GPT) -> None:
    factors = layer_factors(net)
    assert factors["resid_lambdas"] == net.resid_lambdas.tolist() and len(factors["x0_lambdas"]) == 3
    assert len(factors["smear_lambda"]) == len(factors["backout_lambda"]) == 1


def test_the_nearest_tokens_point_the_same_way() -> None:
    table = torch.tensor([[1.0, 0.0], [5.0, 0.5], [0.0, 1.0], [-1.0, 0.0]])
    assert [token for token, _ in nearest_tokens(table, 0)] == [1, 2, 3]
    assert nearest_tokens(table, 0, 1)[0][1] == pytest.approx(math.cos(math.atan(0.1)))
    with pytest.raises(UserError, match=r"token_id=4: must be 0 … 3"):
        nearest_tokens(table, 4)


def test_scores_of_an_answer_are_those_of_the_same_text_given(model: ModelAndTokenizer) -> None:
    prompt = [model.tokenizer.bos_id, *model.tokenizer.encode("ab")]
    (result,) = Engine(model).generate([prompt], max_tokens=6, top_logprobs=3, tools=False)
    written = scored_result(model.tokenizer, result)
    read = score_tokens(model.net, model.tokenizer, [*prompt, *result.ids], top=3)[len(prompt) - 1 :]
    assert [each.token_id for each in written] == [each.token_id for each in read] == result.ids
    assert [each.logprob for each in written] == pytest.approx([each.logprob for each in read], abs=1e-4)
    assert [each.alternatives[0][0] for each in written] == [each.text for each in written]  # greedy
    assert all(len(each.alternatives) == 3 and not each.forced for each in written)
    with pytest.raises(UserError, match="there must be two"):
        score_tokens(model.net, model.tokenizer, prompt[:1])


def test_tokens_are_shown_on_one_line() -> None:
    tokenizer = byte_tokenizer()
    shown = [show_token(tokenizer, token_id) for token_id in tokenizer.encode("a\n\té\x07")]
    assert shown == ["a", "⏎", "⇥", "\\xc3", "\\xa9", "\\x07"]
    assert show_token(tokenizer, tokenizer.bos_id) == "<|bos|>"


def test_less_likely_tokens_are_darker() -> None:
    likely, unlikely, never, unknown = logprob_colors([0.0, -2.0, -50.0, None])
    brightness = [sum(bytes.fromhex(color[1:])) for color in (likely, unlikely, never)]
    assert brightness == sorted(brightness, reverse=True) and likely == "#ffffff" and unknown == "#d1d5db"


def test_drawings_hold_every_token_and_head(net: GPT) -> None:
    figure = draw_tokens(["abc", "⏎", "$x_1$", "y" * 30], ["white"] * 4, "a title", columns=20)
    axes = figure.axes[0]
    assert "".join(text.get_text() for text in axes.texts) == "abc⏎$x_1$" + "y" * 30
    assert axes.get_ylim()[0] == 4  # a line ends at ⏎, a long token takes two
    with pytest.raises(UserError, match="2 texts and 1 colors"):
        draw_tokens(["a", "b"], ["white"])
    traced = trace(net, ids_for(net))
    panels = draw_attention(traced.attention[0], ["t"] * 12, window=3).axes
    assert len([axes for axes in panels if axes.images]) == net.config.num_heads
    assert len(panels[0].lines) == 1
