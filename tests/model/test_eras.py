"""Three generations of the architecture: settings of one network, held against the recipe and not against the code."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.convert.nanochat.versions import ERAS as READABLE
from nanochat_pl.convert.nanochat.versions import ReferenceConfig, resolve
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model, window_sizes
from nanochat_pl.model.counts import count_parameters, flops_per_token, weight_bytes
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from tests.helpers.models import random_ids

ERAS = ("nanochat", "nanochat_2026_02", "nanochat_2025_10")


def settings_of(*overrides: str) -> ModelSettings:
    """The settings as a person gets them, by the names of the files."""
    return compose_train(overrides).config.model


def first_net(era: str, *overrides: str) -> GPT:
    """A small network with its first weights: width 320, five layers, keys and values half as wide."""
    sizes = ("depth=5", "aspect_ratio=51", "head_dim=80", "num_kv_heads=2", "sequence_len=64")
    settings = settings_of(f"model={era}", *(f"model.{size}" for size in sizes), *overrides)
    net = GPT(resolve_model(settings, 1000, "float32")).materialise()
    return init_weights(net, seed=3, settings=settings.init)


def test_the_current_generation_is_the_default_and_its_file_says_so() -> None:
    assert settings_of() == settings_of("model=nanochat") == ModelSettings()


# Recipe, section 3: depth 4, rows of 1,024, a vocabulary that is no multiple of 64.
RECIPE = {
    "nanochat": {
        "padded_vocab_size": 1024,
        "windows": (256, 256, 256, 1024),
        "rotary_base": 100_000.0,
        "rotary_bfloat16": False,
        "qk_scale": 1.2,
        "smear_channels": 24,
        "backout": True,
        "residual_lambdas": True,
        "value_embedding_layers": (1, 3),
        "value_gate_channels": 12,
        "value_gate_scale": 3.0,
    },
    "nanochat_2026_02": {
        "padded_vocab_size": 1024,
        "windows": (512, 512, 512, 1024),
        "rotary_base": 10_000.0,
        "rotary_bfloat16": True,
        "qk_scale": 1.0,
        "smear_channels": 0,
        "backout": False,
        "residual_lambdas": True,
        "value_embedding_layers": (1, 3),
        "value_gate_channels": 32,
        "value_gate_scale": 2.0,
    },
    "nanochat_2025_10": {
        "padded_vocab_size": 1000,
        "windows": (1024, 1024, 1024, 1024),
        "rotary_base": 10_000.0,
        "rotary_bfloat16": True,
        "qk_scale": 1.0,
        "smear_channels": 0,
        "backout": False,
        "residual_lambdas": False,
        "value_embedding_layers": (),
    },
}


@pytest.mark.parametrize("era", ERAS)
def test_architecture_of_the_recipe(era: str) -> None:
    config = resolve_model(settings_of(f"model={era}", "model.depth=4", "model.sequence_len=1024"), 1000, "float32")
    assert {name: getattr(config, name) for name in RECIPE[era]} == RECIPE[era]
    assert (config.width, config.num_heads, config.num_kv_heads, config.mlp_width) == (256, 2, 2, 1024)
    assert (config.softcap, config.rotary_reach) == (15.0, 10_240)
    assert build(GPTConfig, to_plain(config)) == config, "a bundle keeps every number"


@pytest.mark.parametrize("era", ERAS)
def test_the_reader_of_checkpoints_knows_the_same_generations(era: str) -> None:
    assert tuple(READABLE) == ERAS
    pattern = settings_of(f"model={era}").window_pattern
    there = ReferenceConfig(sequence_len=1024, vocab_size=1000, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
    read = resolve(dataclasses.replace(there, window_pattern=pattern), era, RECIPE[era]["padded_vocab_size"])
    typed = settings_of(f"model={era}", "model.depth=4", "model.sequence_len=1024")
    assert read == resolve_model(typed, 1000, "float32")


def test_short_windows_of_each_generation() -> None:
    """A quarter of the row rounded up to 128s; half of it, rounded down."""
    now, february = (settings_of(f"model={era}", "model.depth=2") for era in ("nanochat", "nanochat_2026_02"))
    for row, of_now in {1: 128, 511: 128, 512: 128, 513: 256, 1025: 384, 2047: 512, 2048: 512, 2049: 640}.items():
        assert window_sizes(dataclasses.replace(now, sequence_len=row)) == (of_now, row)
        assert window_sizes(dataclasses.replace(february, sequence_len=row)) == (row // 2, row)


def test_a_size_goes_with_any_generation() -> None:
    settings = settings_of("model=[nanochat_2025_10,tiny]")
    tiny, october = settings_of("model=tiny"), settings_of("model=nanochat_2025_10")
    assert settings == dataclasses.replace(
        october, depth=tiny.depth, head_dim=tiny.head_dim, sequence_len=tiny.sequence_len
    )


@pytest.mark.parametrize(
    "overrides, messages",
    [
        (["model=nanochat_2025_11"], ["model=nanochat_2025_11: there is no such choice; did you mean nanochat_2025"]),
        (["model.init.wte=3", "model.init.linears=xavier"], ["did you mean model.init.wte_std", "uniform, normal"]),
        (["model=nanochat_2025_10", "model.num_kv_heads=5"], ["num_kv_heads=5: does not divide the 6 query heads"]),
        (["model.vocab_multiple=0", "model.short_window_multiple=0"], ["vocab_multiple=0", "short_window_multiple=0"]),
    ],
)
def test_what_does_not_fit_is_said_at_once(overrides: list[str], messages: list[str]) -> None:
    with pytest.raises(UserError) as error:
        settings_of(*overrides)
    assert len(error.value.problems) == len(messages)
    assert all(any(message in line for line in error.value.problems) for message in messages)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("era", ERAS)
def test_counts_are_those_of_the_network(era: str, depth: int) -> None:
    """Parameters and FLOPs added up over the modules of a network on the meta device."""
    settings = settings_of(f"model={era}", f"model.depth={depth}", "model.sequence_len=512", "model.num_kv_heads=1")
    config = resolve_model(settings, 1000, "float32")
    net = GPT(config)
    assert count_parameters(config)["total"] == sum(parameter.numel() for parameter in net.parameters())
    assert weight_bytes(config) == 4 * count_parameters(config)["total"]
    linears = sum(parameter.numel() for name, parameter in net.named_parameters() if _is_linear(name))
    keys = sum(min(block.attn.window, config.sequence_len) for block in net.blocks)
    assert flops_per_token(config) == 6 * linears + 12 * config.num_heads * config.head_dim * keys


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and not name.startswith(("transformer.wte", "value_embeds"))


def assert_normal(weight: torch.Tensor, std: float) -> None:
    assert weight.std().item() == pytest.approx(std, rel=0.03) and abs(weight.mean().item()) < 0.03 * std
    assert weight.abs().max() > 3 * std, "a uniform distribution ends at 1.73 deviations"


def assert_uniform(weight: torch.Tensor, low: float, high: float) -> None:
    reach = 0.01 * (high - low)
    assert low <= weight.min() < low + reach and high - reach < weight.max() <= high
    assert weight.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.03)


def test_first_weights_of_february_2026() -> None:
    net = first_net("nanochat_2026_02")
    weights = net.state_dict()
    bound = (3 / 320) ** 0.5
    assert_normal(weights["transformer.wte.weight"], 1.0)
    assert_normal(weights["lm_head.weight"], 0.001)
    for name in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.c_fc"):
        assert_uniform(weights[f"transformer.h.2.{name}.weight"], -bound, bound)
    assert_uniform(weights["value_embeds.2.weight"], -bound, bound)
    for name in ("attn.ve_gate", "attn.c_proj", "mlp.c_proj"):
        assert not weights[f"transformer.h.2.{name}.weight"].any(), name
    assert weights["resid_lambdas"].tolist() == [1.0] * 5
    assert weights["x0_lambdas"].tolist() == pytest.approx([0.1] * 5)
    assert not {"smear_gate.weight", "smear_lambda", "backout_lambda"} & weights.keys()


def test_first_weights_of_october_2025() -> None:
    weights = first_net("nanochat_2025_10").state_dict()
    assert_normal(weights["transformer.wte.weight"], 1.0)
    assert not weights["lm_head.weight"].any()
    for name in ("attn.c_proj", "mlp.c_proj"):
        assert not weights[f"transformer.h.2.{name}.weight"].any(), name
    width = 320**-0.5
    assert_normal(weights["transformer.h.2.attn.c_q.weight"], width)
    assert_normal(weights["transformer.h.2.mlp.c_fc.weight"], width)  # four times as many outputs: no factor above 1
    for name in ("attn.c_k", "attn.c_v"):  # half as many outputs as inputs
        assert_normal(weights[f"transformer.h.2.{name}.weight"], width * 0.5**0.5)
    assert all(name.startswith(("transformer.", "lm_head.")) for name in weights)


def test_value_embeddings_are_drawn_like_the_value_linear_of_their_layer() -> None:
    weights = first_net("nanochat_2025_10", "model.value_embeddings=true").state_dict()
    assert_normal(weights["value_embeds.2.weight"], (1 / 320) ** 0.5 * 0.5**0.5)


@pytest.mark.parametrize("era", ERAS)
def test_every_generation_learns_from_its_first_weights(era: str) -> None:
    """What begins at zero passes no gradient on at first, but gets one: after some steps no part is where it was."""
    sizes = ("depth=3", "aspect_ratio=16", "head_dim=16", "sequence_len=32")
    settings = settings_of(f"model={era}", *(f"model.{size}" for size in sizes))
    net = GPT(resolve_model(settings, 100, "float32")).materialise()
    init_weights(net, seed=3, settings=settings.init)
    start = {name: weight.clone() for name, weight in net.state_dict().items()}
    # Learning rates for a batch this small.
    hyper = resolve_hyperparameters(OptimSettings(), width=net.config.width, batch_lr_scale=0.1, weight_decay_scale=0.0)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    ids = random_ids(net.config, 4, 33)
    losses = []
    for _ in range(6):
        loss = net.weighted_loss(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(100), abs=0.01), "the first guess is even"
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    assert losses[-1] < losses[0] - 0.5
    still = [name for name, weight in net.state_dict().items() if torch.equal(weight, start[name])]
    assert not still, still
