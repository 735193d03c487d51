"""Settings to config, config to network: what fits, what is refused, what it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.counts import count_parameters, flops_per_token, kv_cache_bytes, require_size, weight_bytes
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.kv_cache import KVCache
from tests.helpers.models import random_ids, tiny_config


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7, 11, 13, 26])
def test_any_depth_gives_whole_heads(depth):
    """A regression: odd depths broke head sizes."""
    config = resolve_model(ModelSettings(depth=depth), 32_768, "bfloat16")
    assert config.width % 128 == 0 and config.width == config.num_heads * 128
    assert 0 <= config.width - 64 * depth < 128
    assert config.value_embedding_layers[-1] == depth - 1
    assert config.windows[-1] == config.sequence_len == 2048 and set(config.windows[:-1]) <= {512, 2048}


def test_the_demo():
    config = resolve_model(ModelSettings(depth=4, head_dim=64, sequence_len=256), 4096, "bfloat16")
    assert (config.width, config.num_heads, config.windows) == (256, 4, (128, 128, 128, 256))
    assert (config.padded_vocab_size, config.rotary_reach, config.mlp_width) == (4096, 2560, 1024)


def test_a_config_survives_json():
    config = resolve_model(ModelSettings(), 32_768, "bfloat16")
    assert build(GPTConfig, to_plain(config)) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 5}, "num_kv_heads=2: does not divide num_heads=5"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"windows": (3, 3)}, "windows: has 2 entries for num_layers=3"),
        ({"value_embedding_layers": (3,)}, "value_embedding_layers"),
        ({"value_embedding_layers": (1, 1)}, "value_embedding_layers"),
        ({"padded_vocab_size": 10}, "padded_vocab_size=10: is below vocab_size=50"),
        ({"smear_channels": 1000}, "smear_channels=1000: is above width=48"),
        ({"value_gate_channels": 1000}, "value_gate_channels=1000: is above width=48"),
        ({"rotary_reach": 5}, "rotary_reach=5: is below sequence_len=32"),
    ],
)
def test_fields_that_do_not_fit_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**15},
        {"vocab_size": 10**12, "padded_vocab_size": 10**12},
        {"windows": [0] * 10_000, "num_layers": 10_000},
        {"rotary_reach": 10**15},
        {"num_layers": -1, "windows": []},
        {"num_heads": 0},
        {"num_kv_heads": 0},
        {"softcap": 0.0},
        {"softcap": float("inf")},
        {"compute_dtype": "os.system"},
        {"windows": "SSSL"},
        {"_target_": "os.system"},
        {"backout": 1},
    ],
)
def test_a_hostile_config_is_refused(changes):
    with pytest.raises(UserError):
        build(GPTConfig, {**to_plain(tiny_config()), **changes})


def test_shapes_of_a_petabyte_are_refused_by_counting():
    """Each field is within its bounds, together they are not: nothing is allocated to find out."""
    large = {"width": 2**16, "num_layers": 1000, "windows": (0,) * 1000, "mlp_width": 2**18}
    config = dataclasses.replace(tiny_config(), **large)
    with pytest.raises(UserError, match="above the limit of 64"):
        require_size(config, 64 * 2**30)
    require_size(tiny_config(), 2**20)
    with pytest.raises(UserError, match="above the limit"):
        require_size(dataclasses.replace(tiny_config(), rotary_reach=2**26), 2**30)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"window_pattern": "SSX"}, "window_pattern='SSX'"),
        ({"window_pattern": ""}, "window_pattern=''"),
        ({"head_dim": 65}, "head_dim=65: must be even"),
        ({"num_kv_heads": 5}, "num_kv_heads=5: does not divide the 6 query heads of depth=12"),
        ({"depth": "abc"}, "depth='abc': must be a whole number"),
        ({"dpeth": 4}, "did you mean depth"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        build(ModelSettings, values)


@pytest.mark.parametrize("changes", [{}, {"smear_channels": 0, "backout": False}, {"residual_lambdas": False}])
def test_counts_are_those_of_the_network(changes):
    config = tiny_config(embedding_dtype="bfloat16", **changes)
    net = init_weights(GPT(config).materialise())
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in net.parameters())
    assert counts["total"] == sum(count for group, count in counts.items() if group != "total")
    assert weight_bytes(config) == sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    cache = KVCache(config, 3, 17, dtype=torch.bfloat16)
    tensors = [cache.ids, *cache.keys, *cache.values]
    assert kv_cache_bytes(config, 3, 17, "bfloat16") == sum(t.numel() * t.element_size() for t in tensors)
    assert flops_per_token(config) > 6 * counts["transformer_matrices"]


def test_the_compute_type_is_a_property_of_the_use():
    config = tiny_config()
    net = init_weights(GPT(config).materialise())
    ids = random_ids(config, 1, 8)
    exact = net(ids)
    net.set_compute_dtype(torch.bfloat16)
    assert net.hidden(ids).dtype == net.cos.dtype == torch.bfloat16 and net(ids).dtype == torch.float32
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    net.set_compute_dtype(torch.float32)
    assert torch.equal(net(ids), exact), "the tables are made again, not rounded twice"
    assert GPT(config, torch.bfloat16).compute_dtype == torch.bfloat16
