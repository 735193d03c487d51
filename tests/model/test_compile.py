"""Compiled or not: the same numbers."""

from __future__ import annotations

import pytest
import torch

from tests.model.helpers import perturbed, random_ids, tiny_config


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class CountingBackend:
    """Runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_one_graph(checkpointing):
    net, backend = perturbed(tiny_config(windows=(3, 70, 128), sequence_len=128, rotary_reach=256)), CountingBackend()
    net.activation_checkpointing = checkpointing
    ids = random_ids(net.config, 2, 128)
    torch.compile(net.weighted_loss, backend=backend, dynamic=False, fullgraph=True)(ids, ids).backward()
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_compiled_loss_and_gradients_are_those_of_eager_float32(dtype, tolerance, checkpointing):
    """In bfloat16 eager itself is some 3% away from float32; compiled code rounds less often."""
    net = perturbed(tiny_config(depth=2, windows=(70, 128), sequence_len=128, rotary_reach=256))
    ids = random_ids(net.config, 2, 128)
    targets = ids.roll(-1, dims=1).index_fill(1, torch.tensor([5]), -1)
    weights = torch.rand(2, 128)
    net.loss_chunk_tokens = 100
    results = []
    for function, used, again in [
        (net.weighted_loss, torch.float32, False),
        (torch.compile(net.weighted_loss, dynamic=False), dtype, checkpointing),
    ]:
        net.set_compute_dtype(used)
        net.activation_checkpointing = again
        net.zero_grad(set_to_none=True)
        loss = function(ids, targets, weights)
        loss.backward()
        results.append((loss.detach(), torch.cat([parameter.grad.flatten() for parameter in net.parameters()])))
    (eager, eager_gradient), (compiled, compiled_gradient) = results
    torch.testing.assert_close(compiled, eager, rtol=tolerance / 10, atol=0)
    assert (compiled_gradient - eager_gradient).norm() <= tolerance * eager_gradient.norm()
