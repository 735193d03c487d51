"""With a cache or without it: the same logits, whatever the chunks, the rows and what happened to the slots before."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.kv_cache import KVCache
from tests.helpers.models import perturbed, random_ids, tiny_config

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def net():
    return perturbed(tiny_config()).requires_grad_(False)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 20, 12], [1, 39], [39, 1]])
def test_chunks_of_any_size(net, chunks):
    """Windows of 3 and 32 in 40 tokens: elsewhere decoding ignored the window, and chunks shifted the mask."""
    ids = random_ids(net.config, 3, 40)
    cache, outputs = KVCache(net.config, 3, 40), []
    for piece in ids.split(chunks, dim=1):
        outputs.append(net(piece, cache))
    torch.testing.assert_close(torch.cat(outputs, dim=1), net(ids), **CLOSE)
    assert cache.positions.tolist() == [40, 40, 40]


def test_long_chunk_on_a_filled_cache_crosses_query_blocks(net):
    config = dataclasses.replace(net.config, windows=(40, 3, 700), sequence_len=60, rotary_reach=700)
    net = perturbed(config).requires_grad_(False)
    ids = random_ids(config, 1, 620)
    cache = KVCache(config, 1, 640)
    outputs = [net(piece, cache) for piece in ids.split([20, 600], dim=1)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), net(ids), **CLOSE)


def test_prompts_of_many_lengths_then_decoding(net):
    prompts = [5, 1, 12, 8]
    ids = random_ids(net.config, 4, 20)
    cache = KVCache(net.config, 4, 32)
    padded = torch.where(torch.arange(12) < torch.tensor(prompts)[:, None], ids[:, :12], 49)
    logits = net(padded, cache, lengths=prompts, last_only=True)
    for extra in range(8):
        for row, length in enumerate(prompts):
            alone = net(ids[row : row + 1, : length + extra])[0, -1]
            torch.testing.assert_close(logits[row], alone, **CLOSE)
        now = torch.tensor([[ids[row, length + extra]] for row, length in enumerate(prompts)])
        logits = net(now, cache, last_only=True)
    assert cache.positions.tolist() == [13, 9, 20, 16]


def test_ragged_chunks_and_idle_rows(net):
    """Rows that get 0, 1 and many tokens in one call, on slots at different positions."""
    ids = random_ids(net.config, 3, 30)
    cache = KVCache(net.config, 3, 30)
    at = [0, 0, 0]
    for lengths in ([4, 0, 9], [1, 6, 1], [0, 20, 3], [25, 1, 17]):
        width = max(lengths)
        chunk = torch.zeros(3, width, dtype=torch.int64)
        for row, length in enumerate(lengths):
            chunk[row, :length] = ids[row, at[row] : at[row] + length]
        logits = net(chunk, cache, lengths=torch.tensor(lengths))
        for row, length in enumerate(lengths):
            whole = net(ids[row : row + 1, : at[row] + length])[0, at[row] :] if length else logits[row, :0]
            torch.testing.assert_close(logits[row, :length], whole, **CLOSE)
            at[row] += length
    assert cache.positions.tolist() == at == [30, 27, 30]


def test_padding_past_the_end_of_the_cache_is_harmless(net):
    ids = random_ids(net.config, 2, 40)
    cache = KVCache(net.config, 2, 20)
    net(ids[:, :19], cache, lengths=[19, 2])
    logits = net(ids[:, 19:36], cache, lengths=[1, 17], last_only=True)
    torch.testing.assert_close(logits[0], net(ids[:1, :20])[0, -1], **CLOSE)
    second = torch.cat([ids[1:, :2], ids[1:, 19:36]], dim=1)
    torch.testing.assert_close(logits[1], net(second)[0, -1], **CLOSE)


def test_slots_are_cut_back_reset_copied_and_swapped(net):
    ids, other = random_ids(net.config, 3, 16), random_ids(net.config, 4, 16, seed=1)
    cache = KVCache(net.config, 4, 32)
    net(ids[:, :12], cache.rows(0, 3))
    cache.truncate(0, 5)
    cache.reset([1])
    cache.copy_slot(2, 1)
    cache.copy_slot(2, 3, length=7)
    cache.swap_slots(0, 3)
    assert cache.positions.tolist() == [7, 12, 12, 5]
    logits = net(other[:, :4], cache, last_only=True)
    for row, (source, kept) in enumerate([(2, 7), (2, 12), (2, 12), (0, 5)]):
        whole = torch.cat([ids[source : source + 1, :kept], other[row : row + 1, :4]], dim=1)
        torch.testing.assert_close(logits[row], net(whole)[0, -1], **CLOSE)
    with pytest.raises(AssertionError, match="12 tokens of a slot that holds 9"):
        cache.copy_slot(3, 0, length=12)


def test_slots_of_a_range_are_counted_within_it(net):
    """Copies and swaps in a range of rows took the first slots of the whole cache."""
    ids = random_ids(net.config, 4, 10)
    cache = KVCache(net.config, 4, 16)
    net(ids[:, :6], cache, lengths=[6, 5, 4, 3])
    part = cache.rows(1, 4)
    part.rows(1, 3).swap_slots(0, 1)
    part.copy_slot(0, 1, length=2)
    part.rows(2, 3).truncate(0, 3)
    assert cache.positions.tolist() == [6, 5, 2, 3]
    logits = net(ids[:1, 6:8].expand(4, 2), cache, last_only=True)
    for row, (source, kept) in enumerate([(0, 6), (1, 5), (1, 2), (2, 3)]):
        whole = torch.cat([ids[source : source + 1, :kept], ids[:1, 6:8]], dim=1)
        torch.testing.assert_close(logits[row], net(whole)[0, -1], **CLOSE)


def test_a_range_of_rows_shares_the_memory(net):
    """New requests are prefilled into free slots while the others wait."""
    ids = random_ids(net.config, 3, 10)
    cache = KVCache(net.config, 3, 16)
    net(ids[:1, :6], cache.rows(0, 1))
    net(ids[1:, :3], cache.rows(1, 3), lengths=[3, 2])
    assert cache.positions.tolist() == [6, 3, 2]
    now = torch.stack([ids[0, 6], ids[1, 3], ids[2, 2]])[:, None]
    logits = net(now, cache, last_only=True)
    for row, length in enumerate([7, 4, 3]):
        torch.testing.assert_close(logits[row], net(ids[row : row + 1, :length])[0, -1], **CLOSE)


def test_a_row_does_not_depend_on_its_neighbours(net):
    ids = random_ids(net.config, 1, 9)
    results = []
    for neighbour in (1, 2):
        cache = KVCache(net.config, 2, 16)
        rows = torch.cat([ids, random_ids(net.config, 1, 9, seed=neighbour)])
        net(rows[:, :5], cache, lengths=[5, neighbour])
        results.append(net(rows[:, 5:6], cache, last_only=True)[0])
    assert torch.equal(*results)


def test_too_long_is_refused_before_anything_is_computed(net):
    reach = net.config.rotary_reach
    with pytest.raises(UserError, match="rotary tables end"):
        net(torch.zeros(1, reach + 1, dtype=torch.int64))
    with pytest.raises(UserError, match="rotary tables end"):
        KVCache(net.config, 1, reach + 1)
    cache = KVCache(net.config, 2, 8)
    net(torch.zeros(2, 6, dtype=torch.int64), cache, lengths=[6, 2])
    with pytest.raises(UserError, match="9 tokens do not fit into a context of 8"):
        net(torch.zeros(2, 3, dtype=torch.int64), cache)
    assert cache.positions.tolist() == [6, 2]


def test_grouped_queries_and_bfloat16():
    config = tiny_config(num_kv_heads=1, num_heads=6)
    net = perturbed(config).requires_grad_(False).set_compute_dtype(torch.bfloat16)
    ids = random_ids(config, 2, 20)
    cache = KVCache(config, 2, 20, net.device, net.compute_dtype)
    outputs = [net(piece, cache) for piece in ids.split([9, 1, 10], dim=1)]
    assert outputs[0].dtype == torch.float32
    torch.testing.assert_close(torch.cat(outputs, dim=1), net(ids), atol=0.15, rtol=0.05)
