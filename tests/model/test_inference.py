"""The network for inference computes what its source does, with the source's weights as they are at the moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanochat_pl.engine import Engine
from nanochat_pl.model.inference import KeptLinear, inference_net
from nanochat_pl.model.loss import nats_of_logits
from nanochat_pl.model.prefix_tree import PrefixTree, SharedPrefix
from nanochat_pl.training.tiny_steps import take_steps, tiny_net, tiny_optimizer
from tests.helpers.models import golden_net, perturbed, random_ids, tiny_config
from tests.helpers.small_engine import SmallBundle, byte_tokenizer
from tests.model.test_decode_bits import RAGGED, cached, network

ARCHITECTURES = {
    "the current one": {},
    "grouped keys": {"num_kv_heads": 2},
    "no smear, no backout": {"smear_channels": 0, "backout": False},
    "no value embeddings, no lambdas": {"value_embedding_layers": (), "residual_lambdas": False},
    "a padded vocabulary": {"padded_vocab_size": 576},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_it_has_the_bits_of_its_source(architecture: str) -> None:
    """Whole rows, decoding of rows of many lengths, and rows that branch."""
    net = network(**ARCHITECTURES[architecture])
    ours = inference_net(net)
    ids = random_ids(net.config, 8, 90)
    tree = PrefixTree([SharedPrefix(ids[0].tolist(), [ids[1, :9].tolist(), ids[2].tolist()])])
    with torch.no_grad():
        whole = net(ids)
        assert torch.equal(ours(ids), whole)
        assert torch.equal(ours.hidden_of_tree(tree), net.hidden_of_tree(tree))
    prompts = [length // 2 for length in RAGGED]
    for row, (found, prompt) in enumerate(zip(cached(ours, ids, prompts, 1), prompts, strict=True)):
        assert torch.equal(found, whole[row, prompt - 1 :])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_float32_it_rounds_elsewhere_at_most(architecture: str) -> None:
    net = network(torch.float32, **ARCHITECTURES[architecture])
    ids = random_ids(net.config, 2, 90)
    with torch.no_grad():
        torch.testing.assert_close(inference_net(net)(ids), net(ids), atol=3e-5, rtol=0)


def test_weights_of_the_right_type_are_shared_and_others_kept() -> None:
    """In float32 only the products of attention, one a layer, are copies."""
    net = network(torch.float32)
    there = {tensor.data_ptr() for tensor in net.parameters()}
    for dtype, copies in ((torch.float32, 2), (torch.bfloat16, 10)):
        ours = inference_net(net.set_compute_dtype(dtype))
        kept = [each._weight for each in ours.modules() if isinstance(each, KeptLinear)]
        assert {weight.dtype for weight in kept} == {dtype}
        assert (len(kept), sum(weight.data_ptr() not in there for weight in kept)) == (10, copies)


def test_what_is_made_for_inference_is_made_once_and_stand_ins_stay() -> None:
    ours = inference_net(network())
    assert inference_net(ours) is ours
    assert inference_net("a script") == "a script"  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_follows_the_training_of_its_source(dtype: torch.dtype) -> None:
    """Stale weights would make rollouts of a policy that is no more."""
    net = tiny_net(torch.device("cpu"), dtype)
    ours, ids = inference_net(net), random_ids(net.config, 2, 12)
    before = ours(ids).detach()
    take_steps(net, tiny_optimizer(net), range(2))
    with torch.no_grad():
        after = ours(ids)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, inference_net(net)(ids), atol=0, rtol=0)


def test_changes_that_no_tensor_counts_are_taken_by_a_refresh() -> None:
    net = perturbed(tiny_config(vocab_size=265)).requires_grad_(False)
    engine, ids = Engine(SmallBundle(net, byte_tokenizer())), random_ids(net.config, 1, 12)
    for parameter in net.parameters():
        parameter.data.mul_(0.5)  # behind the counter's back
    assert (engine.net(ids) - net(ids)).abs().max() > 1e-3
    engine.refresh()
    torch.testing.assert_close(engine.net(ids), net(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_8_bits_are_close_and_say_mostly_the_same(golden: Path, dtype: torch.dtype) -> None:
    """Measured on the golden model and its greedy continuations, of which the numbers are those of docs/LOG.md."""
    net = golden_net(golden).set_compute_dtype(dtype).requires_grad_(False)
    ours = inference_net(net, quantize="int8")
    cases = json.loads((golden / "generation.json").read_text(encoding="utf-8"))
    distances, equal = [], []
    for case in cases:
        ids = torch.tensor([case["prompt_ids"] + case["greedy_ids"]])
        logits, rough = net(ids[:, :-1]), ours(ids[:, :-1])
        distances.append((nats_of_logits(logits, ids[:, 1:]) - nats_of_logits(rough, ids[:, 1:])).abs().flatten())
        equal.append((logits.argmax(-1) == rough.argmax(-1)).flatten())
    distance, share = torch.cat(distances).mean().item(), torch.cat(equal).float().mean().item()
    print(f"int8 in {dtype}: mean difference {distance:.4f} nats, greedy tokens equal {share:.1%}")
    assert 0 < distance < 0.02 and share > 0.9
