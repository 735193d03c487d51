"""What a training step keeps for its backward, and that the knobs which save memory change nothing else."""

from __future__ import annotations

import pytest
import torch

from nanochat_pl.model.attention import plain
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.kv_cache import KVCache
from tests.helpers.models import perturbed, random_ids, tiny_config


def kept_tensors(net: GPT, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What autograd keeps of a forward, each storage once; parameters and rotary tables are there anyway."""
    there = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net.weighted_loss(ids, ids)
    return kept


def gradients(net: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad(set_to_none=True)
    loss = net.weighted_loss(ids, ids.roll(-1, dims=1))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("changes", [{}, {"residual_lambdas": False}, {"smear_channels": 0, "backout": False}])
def test_activation_checkpointing_does_not_change_a_bit(changes):
    net = perturbed(tiny_config(**changes))
    ids = random_ids(net.config, 2, 32)
    plain = gradients(net, ids)
    net.activation_checkpointing = True
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(net, ids), plain, strict=True))


def test_activation_checkpointing_keeps_one_tensor_of_the_stream_per_layer():
    sizes = {}
    for depth in (4, 8):
        settings = ModelSettings(depth=depth, aspect_ratio=64 // depth, head_dim=8, sequence_len=32)
        net = perturbed(resolve_model(settings, 50, "float32"))
        net.activation_checkpointing = True
        kept = kept_tensors(net, random_ids(net.config, 2, 32))
        sizes[depth] = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert sizes[8] - sizes[4] == 4 * (2 * 32 * 64 * 4)


def test_activation_checkpointing_is_for_training_alone(monkeypatch):
    net = perturbed(tiny_config())
    net.activation_checkpointing = True
    ids = random_ids(net.config, 2, 8)

    def refuse(*arguments, **options):
        raise AssertionError("nothing is to be computed again here")

    monkeypatch.setattr("nanochat_pl.model.gpt.checkpoint", refuse)
    net(ids, KVCache(net.config, 2, 16))
    with torch.no_grad():
        net.losses(ids, ids)
        net.weighted_loss(ids, ids)
    with pytest.raises(AssertionError):
        net.weighted_loss(ids, ids)


@pytest.mark.parametrize("reach", [0, 2048], ids=["sdpa", "products"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_window_keeps_no_tensor_of_all_pairs(monkeypatch, reach, kv_heads):
    """A regression, for what is kept to the backward: with a window of w there are T · w pairs, not T · T."""
    monkeypatch.setattr(plain, "PRODUCTS_REACH", reach)
    length, window = 2048, 128
    config = tiny_config(depth=1, num_kv_heads=kv_heads, sequence_len=length, rotary_reach=length, windows=(window,))
    kept = kept_tensors(perturbed(config), random_ids(config, 1, length))
    assert max(tensor.numel() for tensor in kept.values()) < length * length / 4
    pairs = sum(tensor.numel() for tensor in kept.values() if tensor.shape[-1] in (window, 2 * window))
    assert pairs <= 2 * config.num_heads * length * 2 * window


def test_a_whole_row_keeps_no_tensor_of_all_pairs_with_sdpa(monkeypatch):
    monkeypatch.setattr(plain, "PRODUCTS_REACH", 0)
    config = tiny_config(depth=1, sequence_len=1024, rotary_reach=1024, windows=(1024,))
    kept = kept_tensors(perturbed(config), random_ids(config, 1, 1024))
    assert max(tensor.numel() for tensor in kept.values()) < 1024 * 1024 / 4


def test_no_logits_are_kept():
    config = tiny_config(vocab_size=4096)
    net = perturbed(config)
    net.loss_chunk_tokens = 8
    ids = random_ids(config, 2, 32)
    kept = kept_tensors(net, ids)
    # The largest is the head's gradient, which was computed in the forward.
    assert max(tensor.numel() for tensor in kept.values()) == config.padded_vocab_size * config.width < 64 * 4096
