"""Bugs of the key-value cache: what is decoded with it must be what the model says without it."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat_pl.engine import Engine
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.kv_cache import KVCache
from tests.helpers.models import perturbed, random_ids, tiny_config
from tests.helpers.small_engine import SmallBundle, byte_tokenizer

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def net() -> GPT:
    """Windows of 3 and 32 positions, rotary tables for 320."""
    return perturbed(tiny_config(vocab_size=265)).requires_grad_(False).eval()


def in_chunks(net: GPT, ids: torch.Tensor, sizes: list[int], max_len: int) -> torch.Tensor:
    cache = KVCache(net.config, len(ids), max_len)
    return torch.cat([net(piece, cache) for piece in ids.split(sizes, dim=1)], dim=1)


def test_slots_that_were_copied_and_swapped_hold_what_they_should(net: GPT) -> None:
    """A cache that was laid out anew had rows and positions mixed up."""
    ids = random_ids(net.config, 3, 24)
    cache = KVCache(net.config, 5, 64)
    net(ids[:, :17], cache.rows(0, 3), lengths=[17, 4, 9])
    cache.copy_slot(2, 3)
    cache.copy_slot(0, 1)  # the longest over the shortest
    cache.copy_slot(0, 4, length=6)
    cache.swap_slots(4, 2)
    held = [(0, 17), (0, 17), (0, 6), (2, 9), (2, 9)]
    logits = net(ids[:1, 20:].expand(5, 4), cache)
    for row, (source, length) in enumerate(held):
        whole = net(torch.cat([ids[source : source + 1, :length], ids[:1, 20:]], dim=1))
        torch.testing.assert_close(logits[row], whole[0, length:], **CLOSE)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 7])
def test_prompts_that_change_places_are_written_as_if_alone(net: GPT, max_batch: int) -> None:
    """A row that was moved into the slot of a finished one read the keys of its neighbour."""
    engine = Engine(SmallBundle(net, byte_tokenizer()))
    chance = random.Random(0)
    prompts = [chance.choices(range(256), k=length) for length in (1, 40, 7, 3, 60, 12, 2)]
    stop_ids = range(0, 265, 9)  # some end early, so that slots are left and filled
    results = engine.generate(prompts, max_tokens=12, max_batch=max_batch, stop_ids=stop_ids, tools=False)
    assert len({len(result.ids) for result in results}) > 2
    for prompt, result in zip(prompts, results, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (ids == prompt or ids[-1] not in stop_ids):
            ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
        assert result.ids == ids[len(prompt) :]


@pytest.mark.parametrize("prefill", [1, 2, 31, 33, 90])
def test_decoding_honours_the_window(net: GPT, prefill: int) -> None:
    """Decoding looked at everything in the cache, which no layer with a window had ever seen in training."""
    ids = random_ids(net.config, 2, 100)
    whole = net(ids)
    decoded = in_chunks(net, ids, [prefill] + [1] * (100 - prefill), max_len=128)
    torch.testing.assert_close(decoded, whole, **CLOSE)
    # The same network without windows says something else past them: so it is they that are held.
    wide = perturbed(tiny_config(vocab_size=265, windows=(100, 100, 100))).requires_grad_(False)
    assert (wide(ids)[:, 50:] - whole[:, 50:]).abs().max() > 0.1


@pytest.mark.slow
def test_logits_do_not_depend_on_how_a_text_is_cut(net: GPT) -> None:
    """A chunk on a filled cache was masked as if it stood at the beginning."""
    chance = random.Random(1)
    ids = random_ids(net.config, 2, 90)
    whole = net(ids)
    for _ in range(25):
        largest = chance.choice([2, 5, 40, 89])
        sizes: list[int] = []
        while (left := 90 - sum(sizes)) > 0:
            sizes.append(min(left, chance.randint(1, largest)))
        torch.testing.assert_close(in_chunks(net, ids, sizes, max_len=chance.choice([90, 91, 320])), whole, **CLOSE)
