"""Drawing from a distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanochat_pl.engine.sampling import Sampler, Sampling, gumbel_noise, noise_keys, seed_of

LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 2.5])
DRAWS = 40_000


def draw(logits: torch.Tensor, rows: list[Sampling], positions, seen=()) -> torch.Tensor:
    return Sampler(rows, logits.shape[-1], logits.device).draw(logits, positions, seen)[0]


def shares(sampling: Sampling, seen=()) -> torch.Tensor:
    """How often each token comes out at the positions of one text."""
    ids = torch.cat(
        [draw(LOGITS.expand(100, -1), [sampling] * 100, range(i, i + 100), seen) for i in range(0, DRAWS, 100)]
    )
    return torch.bincount(ids, minlength=len(LOGITS)) / DRAWS


def assert_shares(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within five standard errors; what cannot be drawn was not drawn."""
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt()).all(), (found, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_are_the_softmax(temperature):
    assert_shares(shares(Sampling(temperature, seed=3)), torch.softmax(LOGITS / temperature, dim=0))


@pytest.mark.parametrize(
    ("setting", "kept"),
    [({"top_k": 3}, [1, 3, 4]), ({"top_p": 0.5}, [1, 4]), ({"top_p": 1e-9}, [1]), ({"min_p": 0.3}, [1, 3, 4])],
)
def test_filters_renormalise(setting, kept):
    expected = torch.softmax(LOGITS.masked_fill(~torch.isin(torch.arange(5), torch.tensor(kept)), -torch.inf), dim=0)
    assert_shares(shares(Sampling(1.0, **setting)), expected)


def test_repetition_penalty():
    seen = torch.tensor([False, True, True, False, False])
    expected = torch.softmax(torch.tensor([0.5, 1.5, -2.0, 2.0, 2.5]), dim=0)
    assert_shares(shares(Sampling(1.0, repetition_penalty=2.0), [seen] * 100), expected)
    greedy = Sampling(repetition_penalty=2.0)
    assert draw(LOGITS[None], [greedy], [0], [seen]).item() == 4


def test_rows_with_different_settings_draw_as_they_do_alone():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    rows = [
        Sampling(),
        Sampling(1.0, seed=1),
        Sampling(0.7, top_k=20, seed=2),
        Sampling(1.3, top_p=0.9, seed=-2),
        Sampling(1.0, min_p=0.05, seed=1),
        Sampling(2.0, top_k=50, top_p=0.8, min_p=0.01, seed=5),
        Sampling(0.5, top_k=10_000, repetition_penalty=1.2, seed=7),
    ]
    seen = torch.arange(300) % 3 == 0
    for position in range(50):
        sampler = Sampler(rows, 300, logits.device)
        ids, scores = sampler.draw(logits, [position] * 7, [seen])
        found = sampler.logprobs(scores, ids, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
        for index, row in enumerate(rows):
            alone = Sampler([row], 300, logits.device)
            own, own_scores = alone.draw(logits[index : index + 1], [position], [seen] if index == 6 else [])
            raw = logits[index : index + 1].log_softmax(-1).gather(-1, own[:, None])[:, 0]
            assert own.item() == ids[index].item()
            assert alone.logprobs(own_scores, own, raw).item() == found[index].item()


def test_a_filtered_draw_is_the_most_of_score_and_noise_among_what_it_keeps():
    """Also of equal scores at the edge, which are all kept; noise is made only for what is kept."""
    vocab_size, rows = 5000, [Sampling(1.5, top_k=k, seed=k) for k in (50, 50, 7, 1, 4000)]
    logits = (4 * torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(3))).round(decimals=1)
    logits = logits.T.contiguous().T  # however they lie in memory
    for part in (slice(0, 2), slice(0, 5), slice(4, 5)):
        for position in range(20):
            ids, scores = Sampler(rows[part], vocab_size, logits.device).draw(
                logits[part], [position] * len(rows[part])
            )
            least = torch.stack(
                [row.topk(each.top_k).values[-1] for row, each in zip(logits[part], rows[part], strict=True)]
            )
            kept = logits[part] >= least[:, None]
            expected = (logits[part] - logits[part].amax(-1, keepdim=True)) / 1.5
            expected = expected.masked_fill(~kept, -torch.inf)
            assert torch.equal(scores, expected)
            assert torch.equal(ids, (expected + noise_of(rows[part], vocab_size, position)).argmax(-1))


def test_sampled_log_probabilities_are_of_what_was_drawn_from():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    sampler = Sampler([Sampling(0.5, top_k=4)], 50, logits.device)
    ids, scores = sampler.draw(logits, [0])
    best = logits[0].topk(4)
    expected = (best.values / 0.5).log_softmax(0)[best.indices.tolist().index(ids.item())]
    raw = logits.log_softmax(-1)[0, ids]
    assert sampler.logprobs(scores, ids, raw).item() == pytest.approx(expected.item(), abs=1e-5)
    outside = torch.tensor([logits[0].argmin()])
    assert sampler.logprobs(scores, outside, raw).item() == -math.inf


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 50}])
def test_one_row_of_a_large_vocabulary_has_the_bits_of_many(setting):
    """Two threads would divide the one sum, and round it elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = 3 * torch.randn(6, 65_536, generator=torch.Generator().manual_seed(2))
        rows = [Sampling(**{"temperature": 1.0} | setting, seed=seed) for seed in range(6)]

        def drawn(part: slice) -> list[tuple[int, float]]:
            sampler = Sampler(rows[part], 65_536, logits.device)
            ids, scores = sampler.draw(logits[part], [0] * len(rows[part]))
            return list(zip(ids.tolist(), sampler.logprobs(scores, ids, logits[part, 0]).tolist(), strict=True))

        assert drawn(slice(None)) == [drawn(slice(i, i + 1))[0] for i in range(6)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [1.0, 1e-300])
def test_what_has_no_probability_is_never_drawn(temperature):
    logits = torch.tensor([[-2000.0, 0.0, 0.0, -2000.0]]).expand(1000, -1)
    ids = draw(logits, [Sampling(temperature)] * 1000, range(1000))
    assert set(ids.tolist()) == {1, 2}


def test_noise_has_the_right_moments_and_no_pattern():
    """Mean and variance of Gumbel's distribution; seeds, positions and tokens that are neighbours are unrelated."""
    keys = torch.randint(-(2**31), 2**31, (64, 2), generator=torch.Generator().manual_seed(0)).int()
    noise = gumbel_noise(keys, 10_000, torch.device("cpu"))
    count = noise.numel()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.577216, abs=5 * math.sqrt(math.pi**2 / 6 / count))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    seeds = [Sampling(1.0, seed=seed) for seed in (0, 0, 1, -1)]
    rows = torch.stack([row for position in (7, 8) for row in noise_of(seeds, 100_000, position)])
    related = torch.corrcoef(rows[[0, 2, 3, 4, 6, 7]]).fill_diagonal_(0).abs().max().item()
    shifted = torch.corrcoef(torch.stack([rows[0, :-1], rows[0, 1:]]))[0, 1].abs().item()
    assert torch.equal(rows[0], rows[1]), "one seed, one position: one noise"
    assert max(related, shifted) < 5 / math.sqrt(100_000)


def noise_of(rows: list[Sampling], vocab_size: int, position: int) -> torch.Tensor:
    """The noise that the rows are given at a position."""
    seeds = np.array([seed_of(row.seed) for row in rows], dtype=np.uint64)
    return gumbel_noise(noise_keys(seeds, [position] * len(rows)), vocab_size, torch.device("cpu"))


def test_seeds_of_neighbouring_keys_differ():
    """29: seeds 1 and -1 gave the same numbers."""
    keys = [(seed, index) for seed in (-1, 0, 1, 12) for index in range(12)] + [(1, 2, 3), (12, 3)]
    assert len({seed_of(*key) for key in keys}) == len({"/".join(map(str, key)) for key in keys})
