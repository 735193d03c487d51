"""Bugs of numbers: types that are too small, memory that holds anything, optimizers that are not the same twice."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.evaluation.bits_per_byte import BitsPerByte
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.model.loss import softcap
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.optim.schedules import StepValues
from tests.helpers.models import perturbed, random_ids, tiny_config
from tests.helpers.small_engine import byte_tokenizer
from tests.helpers.small_optim import make_optimizer, make_parameters, set_gradients
from tests.helpers.training import Loop, batch_of, tiny_model
from tests.regressions.conftest import CountingCompiler
from tests.regressions.test_source import FILES, nodes


def test_the_softcap_is_computed_in_float32() -> None:
    """In bfloat16 a softcap rounds logits near the cap to one number, and the loss to two digits."""
    raw = torch.tensor([20.0, 20.125, 20.25], dtype=torch.bfloat16)
    capped = softcap(raw, 15.0)
    assert capped.dtype == torch.float32
    torch.testing.assert_close(capped.double(), 15 * torch.tanh(raw.double() / 15), atol=1e-5, rtol=0)
    assert len(set(capped.tolist())) == 3 and len(set(capped.bfloat16().tolist())) < 3


def test_logits_and_loss_of_a_bfloat16_model_are_float32() -> None:
    """The head's output was capped, and its exponentials were summed, in the type of the activations."""
    net = perturbed(tiny_config()).requires_grad_(False).set_compute_dtype(torch.bfloat16)
    ids = random_ids(net.config, 2, 20)
    raw = F.linear(net.hidden(ids), net.lm_head.weight.bfloat16())[..., : net.config.vocab_size]
    assert raw.dtype == torch.bfloat16
    exact = net.config.softcap * torch.tanh(raw.double() / net.config.softcap)
    torch.testing.assert_close(net(ids).double(), exact, atol=1e-5, rtol=1e-6)
    nats = -exact.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(net.losses(ids, ids).double(), nats, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(net.weighted_loss(ids, ids).double(), nats.sum(), atol=0, rtol=1e-6)


@pytest.fixture
def memory_that_holds_nan() -> Iterator[None]:
    """New memory that nobody has filled holds NaN, as on a bad day."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_nothing_is_left_uninitialised_after_the_meta_device(memory_that_holds_nan: None, depth: int) -> None:
    """A buffer or a new parameter that no first weight was written into held whatever the memory did."""
    assert torch.empty(3).isnan().all(), "this test needs memory that shows"
    config = tiny_model(depth=depth)
    net = GPT(config)
    assert all(tensor.is_meta for tensor in [*net.parameters(), *net.buffers()])
    net.materialise()
    assert all(parameter.isnan().all() for parameter in net.parameters()), "a forgotten weight must show"
    loaded = GPT(config).materialise()
    loaded.load_state_dict(init_weights(net).state_dict())
    for each in (net, loaded, loaded.set_compute_dtype(torch.bfloat16)):
        for name, tensor in [*each.named_parameters(), *each.named_buffers()]:
            assert tensor.isfinite().all(), name
    cache = KVCache(config, 2, 12, dtype=torch.bfloat16)
    ids = random_ids(config, 2, 5)
    assert loaded(ids, cache, lengths=[5, 2], last_only=True).isfinite().all()
    assert loaded(ids[:, :1], cache).isfinite().all()


def test_a_step_on_dirty_memory_gives_the_same_weights(memory_that_holds_nan: None) -> None:
    """The optimizer's state came from memory that nobody had cleared."""
    dirty = Loop(device_batch_size=3)
    dirty.train_steps(batch_of([16, 3, 0, 9]), num_steps=2)
    torch.use_deterministic_algorithms(False)
    clean = Loop(device_batch_size=3)
    clean.train_steps(batch_of([16, 3, 0, 9]), num_steps=2)
    for (name, one), other in zip(dirty.net.named_parameters(), clean.net.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("depth", [1, 3, 5, 7])
def test_models_of_odd_depth_train_and_write(depth: int) -> None:
    """Odd depths broke the heads, the middle of the stream or the layer of the last value embedding."""
    config = tiny_model(vocab_size=40, depth=depth)
    assert config.value_embedding_layers[-1] == depth - 1 and config.windows[-1] == config.sequence_len
    net = perturbed(config)
    batch = batch_of([16, 16])
    net.weighted_loss(batch.inputs, batch.targets).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or (name == "backout_lambda" and depth == 1), name
    cache = KVCache(config, 2, 16)
    with torch.no_grad():
        steps = [net(batch.inputs[:, t : t + 1], cache) for t in range(16)]
        torch.testing.assert_close(torch.cat(steps, dim=1), net(batch.inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_there_is_one_optimizer() -> None:
    """The optimizer of one process and that of several were two copies, and a repair of one missed the other."""
    classes, others, updates = [], [], []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef) and any("Optimizer" in ast.unparse(base) for base in node.bases):
                classes.append(node.name)
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("torch.optim.", "optim.")):
                others.append(f"{path}:{node.lineno}")
            if isinstance(node, ast.FunctionDef) and any("lerp" in ast.unparse(line) for line in node.body):
                updates.append(node.name)
    assert classes == ["MuonAdamW"] and others == []
    assert sorted(updates) == ["muon_update", "normuon_scale"], "where moments are updated"


@pytest.mark.slow
def test_the_compiled_update_is_the_eager_one(compiler: CountingCompiler) -> None:
    """A second implementation for the compiler had another rule of weight decay."""
    eager, compiled = make_parameters(), make_parameters()
    pairs = [(eager, make_optimizer(eager)), (compiled, make_optimizer(compiled, OptimSettings(compile=True)))]
    for step in range(5):
        for parameters, optimizer in pairs:
            set_gradients(parameters, step)
            optimizer.set_step_values(StepValues((step + 1) / 5, 0.85 + step / 50, 1 - step / 5))
            optimizer.step()
    assert compiler.num_graphs > 1
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", [[[0, IGNORE_INDEX, 0], [IGNORE_INDEX] * 3], []])
def test_nothing_to_measure_is_no_number(targets: list[list[int]]) -> None:
    """Zero bytes gave a division by zero, or Infinity in a JSON file."""
    metric = BitsPerByte([0, 1, 2])
    goals = torch.tensor(targets, dtype=torch.int64).view(-1, 3)
    metric.update(torch.full(goals.shape, torch.inf), goals)
    assert metric.compute() == (None, None, 0, 0)
    metric.update(torch.tensor([[3.0, torch.inf, torch.nan]]), torch.tensor([[2, 0, IGNORE_INDEX]]))
    assert metric.compute() == (pytest.approx(1.5 / math.log(2)), None, 2, 1)


class RowsOfBos:
    """Stands in for packed rows: of numbered rows, those from ``first`` on are of the token bos alone."""

    def __init__(self, first: int) -> None:
        self.first = first

    def read(self, row_numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.stack([np.random.default_rng(number).integers(0, 256, 17) for number in row_numbers])
        ids[np.asarray(row_numbers) >= self.first] = byte_tokenizer().bos_id
        return ids[:, :-1].copy(), ids[:, 1:].copy()


def test_rows_of_special_tokens_alone_have_no_bits_per_byte() -> None:
    """One row without bytes made the mean over rows infinite."""

    def measure(first: int, num_rows: int) -> dict[str, float]:
        rows: Any = RowsOfBos(first)
        return Validation.of_rows(rows, num_rows, byte_tokenizer(), batch_size=1).measure(net)

    net = init_weights(GPT(tiny_model()).materialise())
    with_bytes, with_empty_rows, only_empty = measure(2, 2), measure(2, 4), measure(0, 4)
    assert with_empty_rows["val/bpb"] == with_bytes["val/bpb"] and with_bytes["val/bpb"] < 10
    assert "val/bpb" not in only_empty and only_empty["val/loss"] > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_where_the_middle_layer_is_the_last_one_backout_is_not_moved_by_rounding(depth: int) -> None:
    """The norm takes its factor out again, but for rounding, of which Adam made whole steps: at 1 all signs changed."""
    net = perturbed(tiny_config(depth)).set_compute_dtype(torch.bfloat16)
    net(random_ids(net.config, 2, 16)).float().logsumexp(dim=-1).sum().backward()
    assert (net.backout_lambda.grad == 0).all() == (depth < 3)
    assert net.resid_lambdas.grad.any()
