"""The network against the loop-written one of tests/reference, over shapes and switches."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import perturbed, random_ids, tiny_config
from tests.reference.model import ReferenceModel

CASES = {
    "era 2026": {},
    "one layer": {"depth": 1, "num_kv_heads": 1},
    "odd depth, odd number of heads": {"depth": 5, "num_kv_heads": 5},
    "even depth": {"depth": 2, "num_kv_heads": 4},
    "one key for all queries": {"num_kv_heads": 1},
    "no smear": {"smear_channels": 0},
    "no backout": {"backout": False},
    "no residual lambdas": {"residual_lambdas": False},
    "no value embeddings": {"value_embedding_layers": ()},
    "value embeddings everywhere": {"value_embedding_layers": (0, 1, 2), "value_gate_scale": 2.0},
    "windows of many sizes": {"windows": (0, 1, 7)},
    "rounded tables, another base": {"rotary_bfloat16": True, "rotary_base": 50.0, "qk_scale": 1.0},
    "low softcap": {"softcap": 0.5},
    "heads narrower together than the stream": {"num_heads": 4, "num_kv_heads": 2, "mlp_width": 20},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_and_losses_agree(changes):
    config = tiny_config(**changes)
    net = perturbed(config, seed=len(changes))
    reference = ReferenceModel(config, net.state_dict())
    ids = random_ids(config, 2, 11)
    targets = ids.roll(-1, dims=1)
    targets[:, -3:] = -1
    with torch.no_grad():
        logits, losses = net(ids), net.losses(ids, targets)
    for row in range(2):
        expected = reference.logits(ids[row].tolist())
        torch.testing.assert_close(logits[row].double(), expected, atol=2e-5, rtol=1e-5)
        expected_losses = torch.tensor(reference.losses(ids[row].tolist(), targets[row].tolist()))
        torch.testing.assert_close(losses[row].double(), expected_losses.double(), atol=2e-5, rtol=1e-5)
