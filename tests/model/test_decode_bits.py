"""In bfloat16 on a CPU cached decoding is the forward of the whole row, bit by bit; in float32 within a tolerance.

The widths are those of matrix products that real kernels take; weights are large, so that no term is lost in another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.model.layers import Linear
from nanochat_pl.model.query_blocks import PRODUCTS_REACH
from tests.helpers.models import random_ids

LENGTH = 200
RAGGED = [5, 20, 33, 64, 100, 128, 150, 180]


TWO = pytest.param(2, marks=pytest.mark.slow)


@pytest.fixture(autouse=True, params=[1, TWO], ids=["1 thread", "2 threads"], scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def network(dtype: torch.dtype = torch.bfloat16, vocab_size: int = 500, **changes: object) -> GPT:
    """Two layers of width 128, windows of 64 and of the whole row, weights of a trained model's size."""
    settings = ModelSettings(
        depth=2, aspect_ratio=64, head_dim=32, sequence_len=256, window_pattern="SL", short_window_multiple=64
    )
    config = dataclasses.replace(resolve_model(settings, vocab_size, "float32"), **changes)
    net, generator = init_weights(GPT(config).materialise()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.eval().set_compute_dtype(dtype)


@torch.inference_mode()
def cached(net: GPT, ids: Tensor, prompts: Sequence[int], chunk: int) -> list[Tensor]:
    """Of each row the logits from the last token of its prompt on; the rest is read in chunks, at most so long."""
    config = net.config
    cache = KVCache(config, len(ids), ids.size(1) + 3, dtype=net.compute_dtype)
    first = net(ids[:, : max(prompts)], cache, prompts, last_only=True)
    found = [[row[None]] for row in first]
    while int(cache.positions.min()) < ids.size(1):
        starts = cache.positions.tolist()
        counts = [min(chunk, ids.size(1) - start) for start in starts]
        new = torch.zeros(len(ids), max(counts), dtype=torch.int64)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            new[row, :count] = ids[row, start : start + count]
        logits = net(new, cache, None if min(counts) == max(counts) else counts)
        for row, count in enumerate(counts):
            found[row].append(logits[row, :count])
    return [torch.cat(rows) for rows in found]


CASES = {
    "one row": ([20], 1, {}),
    "one row, from its first token": ([1], 1, {}),
    "rows of one length": ([20] * 3, 1, {}),
    "rows of many lengths": (RAGGED, 1, {}),
    "many lengths in chunks of 7": (RAGGED, 7, {}),
    "many lengths in chunks of 150": (RAGGED, 150, {}),
    "grouped keys": (RAGGED, 1, {"num_kv_heads": 2}),
    "one key head": (RAGGED, 5, {"num_kv_heads": 1}),
    "windows of 16 and 32": (RAGGED, 1, {"windows": (16, 32)}),
}


# One of each kind; the others are slow, as where the processor has no products in bfloat16 each takes seconds.
QUICK = ("one row", "rows of many lengths", "many lengths in chunks of 7", "windows of 16 and 32")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_in_bfloat16_cached_decoding_has_the_bits_of_the_whole_row(case: str) -> None:
    prompts, chunk, changes = CASES[case]
    net = network(**changes)
    ids = random_ids(net.config, len(prompts), LENGTH)
    whole = net(ids).detach()  # with a graph for gradients, as it is trained
    with torch.no_grad():
        assert torch.equal(net(ids), whole)
    for row, (found, prompt) in enumerate(zip(cached(net, ids, prompts, chunk), prompts, strict=True)):
        assert torch.equal(found, whole[row, prompt - 1 :]), (row, (found - whole[row, prompt - 1 :]).abs().max())


@pytest.mark.parametrize("case", ["one row", "many lengths in chunks of 7", "grouped keys"])
def test_in_float32_cached_decoding_is_the_whole_row_within_a_tolerance(case: str) -> None:
    """Products of few rows add up in another order: measured 2e-6 of log-probabilities; logits reach 15."""
    prompts, chunk, changes = CASES[case]
    net = network(torch.float32, **changes)
    ids = random_ids(net.config, len(prompts), LENGTH)
    with torch.no_grad():
        whole = net(ids)
    for row, (found, prompt) in enumerate(zip(cached(net, ids, prompts, chunk), prompts, strict=True)):
        torch.testing.assert_close(found, whole[row, prompt - 1 :], atol=3e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_vocabulary_of_65536(rows: int) -> None:
    """One row times a large head is where two threads would divide a sum."""
    net = network(vocab_size=65_536)
    ids = random_ids(net.config, rows, 40)
    with torch.no_grad():
        whole = net(ids)
    for row, found in enumerate(cached(net, ids, [30] * rows, 1)):
        assert torch.equal(found, whole[row, 29:])


def test_past_the_reach_of_products_bits_depend_on_no_cut_and_are_close_to_the_fused_kernels() -> None:
    """A CPU reads longer rows with sdpa, but over a cache always with products: warm and cold stay the same."""
    config = network().config
    net = network(sequence_len=PRODUCTS_REACH, rotary_reach=PRODUCTS_REACH + 256, windows=(64, PRODUCTS_REACH))
    assert config.num_layers == 2
    ids = random_ids(net.config, 1, PRODUCTS_REACH + 100)
    (found,) = cached(net, ids, [PRODUCTS_REACH + 90], 1)
    for prompt, chunk in [(PRODUCTS_REACH - 30, 50), (600, 301)]:
        (other,) = cached(net, ids, [prompt], chunk)
        assert torch.equal(other[-11:], found)
    with torch.no_grad():
        whole = net(ids)[0, -11:]
        reach = net(ids[:, :PRODUCTS_REACH])[0, -1]
    assert (found - whole).abs().max() < 0.25
    (within,) = cached(net, ids[:, :PRODUCTS_REACH], [PRODUCTS_REACH - 2], 1)
    assert torch.equal(within[-1], reach)


@pytest.mark.parametrize("shape", [(12, 4), (24, 1), (32, 8)])
def test_small_products_have_the_bits_of_large_ones(shape):
    """Gates have a few inputs and outputs: PyTorch has a kernel of its own for so few multiplications."""
    inputs, outputs = shape
    linear, generator = Linear(inputs, outputs), torch.Generator().manual_seed(0)
    for _ in range(100):
        with torch.no_grad():
            linear.weight.copy_(torch.randn(outputs, inputs, generator=generator))
        x = torch.randn(1000, inputs, generator=generator).bfloat16()
        whole = linear(x)
        for rows in (1, 3, 32, 85):
            assert torch.equal(linear(x[:rows]), whole[:rows])
        assert torch.equal(linear(x[:6].view(2, 3, inputs)), whole[:6].view(2, 3, outputs))


def test_attention_to_few_keys_has_the_bits_of_attention_in_a_batch():
    """One row with few keys is so small a product, too, unless it has some keys more."""
    settings = ModelSettings(depth=2, aspect_ratio=16, head_dim=16, num_kv_heads=1, sequence_len=128)
    net = GPT(resolve_model(settings, 300, compute_dtype="bfloat16")).materialise()
    init_weights(net)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3, generator=generator)
        for length in range(2, 40):
            ids = torch.randint(300, (9, length), generator=generator)
            caches = [KVCache(net.config, rows, 64, dtype=torch.bfloat16) for rows in (1, 9)]
            found = []
            for cache, rows in zip(caches, (ids[:1], ids), strict=True):
                net(rows[:, :-1], cache)
                found.append(net(rows[:, -1:], cache, last_only=True)[0])
            assert torch.equal(*found), length
