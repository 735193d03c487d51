"""The loss: weights, ignored targets, and numbers that only float32 gets right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat_pl.model import loss as loss_module
from nanochat_pl.model.counts import default_chunk_tokens
from nanochat_pl.model.loss import fused_linear_cross_entropy, token_losses
from tests.helpers.models import perturbed, random_ids, tiny_config


def textbook(hidden, head, targets, weights, cap):
    capped = cap * torch.tanh(hidden.double() @ head.double().T / cap)
    return (F.cross_entropy(capped, targets, ignore_index=-1, reduction="none") * weights).sum()


def loss_case(vocab_size=33, tokens=63, width=7, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(tokens, width, generator=generator)
    head = torch.randn(vocab_size, width, generator=generator)
    targets = torch.arange(tokens) % (vocab_size + 1) - 1
    return hidden, head, targets, torch.linspace(-2, 2, tokens)


@pytest.mark.slow  # by the compiler itself
def test_what_is_compiled_instead_of_tanh_is_one():
    """At both ends, around 0 and beyond the range of the exponential; its gradient as well."""
    torch.compiler.reset()
    compiled = torch.compile(loss_module.tanh_of)
    spread = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 38, 200), -torch.logspace(-30, 38, 200)])
    x = torch.cat([spread, torch.tensor([0.0, torch.inf, -torch.inf])])
    assert (compiled(x.clone()).double() - x.double().tanh()).abs().max() < 2e-7
    assert compiled(torch.tensor([torch.nan])).isnan().all()
    points = torch.linspace(-9, 9, 101, requires_grad=True)
    compiled(points * 1).sum().backward()
    assert (points.grad.double() - (1 - points.detach().double().tanh().square())).abs().max() < 1e-6
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_piece_of_the_loss_is_that_of_eager(dtype):
    raw = (3 * torch.randn(96, 1000, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets, weights = torch.arange(96) * 10, torch.linspace(-1, 2, 96)
    total, gradient, nats = loss_module.compiled_piece(raw.device, dtype, 96)(raw.clone(), targets, weights, 15.0)
    expected_total, expected, expected_nats = loss_module._chunk(raw.clone(), targets, weights, 15.0)
    torch.testing.assert_close(nats, expected_nats, atol=1e-5, rtol=0)
    torch.testing.assert_close(total, expected_total, atol=1e-3, rtol=0)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("cap", [0.5, 15.0, 64.0])
@pytest.mark.parametrize("chunk_tokens", [1, 10, 10_000])
def test_loss_and_its_gradients_are_those_of_the_textbook(cap, chunk_tokens):
    """The gradients are written by hand: they have to be those of the formula, to the ends of the range."""
    hidden, head, targets, weights = loss_case(scale=15.0)
    results = []
    for function, dtype in [(fused_linear_cross_entropy, torch.float32), (textbook, torch.float64)]:
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, head)]
        options = {"vocab_size": 33, "chunk_tokens": chunk_tokens} if function is fused_linear_cross_entropy else {}
        loss = function(*inputs, targets, weights, cap=cap, **options)
        loss = loss[0] if function is fused_linear_cross_entropy else loss
        (0.1 * loss).backward()  # the caller divides by the number of targets
        results.append([loss.detach().float(), *(tensor.grad.float() for tensor in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-5)


def test_gradcheck_in_float64():
    hidden, head, targets, weights = (
        tensor.double().requires_grad_() if tensor.dim() == 2 else tensor for tensor in loss_case(9, 8, 3)
    )

    def loss(hidden, head):
        return fused_linear_cross_entropy(
            hidden, head, targets, weights.double(), vocab_size=7, cap=1.5, chunk_tokens=3
        )[0]

    targets = targets.clamp(max=6)
    assert torch.autograd.gradcheck(loss, (hidden, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_follows_the_rules_of_an_operation(dtype):
    """What the compiler relies on: shapes and types as declared, no argument changed, no result that shares memory."""
    hidden, head, targets, weights = loss_case()
    arguments = (hidden.to(dtype).requires_grad_(), head.requires_grad_(), targets.clamp(max=29), weights, 30, 15.0, 4)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(loss_module._nats_with_gradients, (*arguments, False), test_utils=checks)


def test_the_number_of_pieces_changes_the_order_of_summation_alone():
    results = []
    for chunk_tokens in (1, 7, 64):
        net = perturbed(tiny_config())
        net.loss_chunk_tokens = chunk_tokens
        ids = random_ids(net.config, 2, 32)
        loss = net.weighted_loss(ids, ids.roll(-1, dims=1))
        loss.backward()
        with torch.no_grad():
            torch.testing.assert_close(net.weighted_loss(ids, ids.roll(-1, dims=1)), loss, rtol=1e-6, atol=0)
        results.append(torch.cat([loss.detach()[None], *(parameter.grad.flatten() for parameter in net.parameters())]))
    for other in results[1:]:
        assert (other - results[0]).norm() <= 1e-6 * results[0].norm()


def test_the_gradient_of_the_head_is_summed_in_float32():
    """A thousand equal pieces: in bfloat16 the sum would stop growing at 256 times a piece's share."""
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, requires_grad=True)
    targets = torch.zeros(1000, dtype=torch.int64)
    fused_linear_cross_entropy(hidden, head, targets, torch.ones(1000), vocab_size=2, cap=15.0, chunk_tokens=1)[
        0
    ].backward()
    torch.testing.assert_close(head.grad, torch.tensor([[-500.0], [500.0]]))


def test_the_padding_of_the_head_gets_no_gradient():
    net = perturbed(tiny_config(vocab_size=50))
    ids = random_ids(net.config, 2, 8)
    net.weighted_loss(ids, ids).backward()
    gradient = net.lm_head.weight.grad
    assert gradient.shape == (64, net.config.width)
    assert torch.equal(gradient[50:], torch.zeros(14, net.config.width)) and bool(gradient[:50].all())


def test_nothing_differentiates_the_loss_twice():
    """Its gradients are numbers by then: a second derivative would be wrong, so it is refused."""
    hidden, head, targets, weights = loss_case()
    hidden.requires_grad_()
    loss, _ = fused_linear_cross_entropy(hidden, head, targets, weights, vocab_size=33, cap=15.0, chunk_tokens=16)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_ignored_targets_have_loss_zero_and_no_gradient():
    net = perturbed(tiny_config())
    ids = random_ids(net.config, 2, 8)
    targets = torch.full_like(ids, -1)
    losses = net.losses(ids, targets)
    assert torch.equal(losses, torch.zeros(2, 8))
    net.weighted_loss(ids, targets).backward()
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in net.parameters())


def test_weighted_loss_is_the_sum_of_weights_times_nats():
    net = perturbed(tiny_config())
    ids = random_ids(net.config, 2, 8)
    targets = ids.roll(-1, dims=1).index_fill(1, torch.tensor([2, 5]), -1)
    weights = torch.randn(2, 8)
    losses = net.losses(ids, targets)
    torch.testing.assert_close(net.weighted_loss(ids, targets, weights), (losses * weights).sum())
    torch.testing.assert_close(net.weighted_loss(ids, targets), losses.sum())
    torch.testing.assert_close(net.weighted_loss(ids, targets, torch.ones(2, 8)), losses.sum())


def test_a_uniform_head_costs_log_of_the_vocabulary():
    losses = token_losses(torch.zeros(1, 3, 64), torch.tensor([[0, 63, -1]]), cap=15.0)
    torch.testing.assert_close(losses, torch.tensor([[1.0, 1.0, 0.0]]) * torch.log(torch.tensor(64.0)))


def test_padding_of_the_vocabulary_is_never_predicted():
    net = perturbed(tiny_config(vocab_size=50))
    assert net.config.padded_vocab_size == 64
    ids = random_ids(net.config, 1, 4)
    before = net(ids)
    with torch.no_grad():
        net.lm_head.weight[50:] += 100.0
    assert before.shape == (1, 4, 50) and torch.equal(before, net(ids))


@pytest.mark.parametrize(
    ("on_cpu", "gpu_memory", "tokens"),
    [(True, None, 128), (False, None, 1024), (False, 2**30 * 24, 1024), (False, 2**30 * 40, 4096)],
)
def test_pieces_by_memory_of_the_device(on_cpu, gpu_memory, tokens):
    assert default_chunk_tokens(2**15, on_cpu, gpu_memory) == tokens
    assert default_chunk_tokens(2**40, on_cpu, gpu_memory) == 1


def test_the_head_gradient_is_summed_in_float32_where_that_can_be_had(monkeypatch):
    """Played by a plain product in float32: rounded pieces are further from it than its own rounding."""
    hidden, head, targets, weights = loss_case(tokens=600)
    calls = []

    def gradient():
        matrix = head.clone().requires_grad_()
        x = hidden.bfloat16()
        loss = fused_linear_cross_entropy(x, matrix, targets, weights, vocab_size=33, cap=15.0, chunk_tokens=100)[0]
        return torch.autograd.grad(loss, matrix)[0]

    def added(total, one, other):
        calls.append((one.dtype, other.dtype))
        total += one.float() @ other.float()

    assert not loss_module.sums_in_float32(torch.device("cpu"), torch.bfloat16)
    rounded = gradient()
    monkeypatch.setattr(loss_module, "sums_in_float32", lambda device, dtype: True)
    monkeypatch.setattr(loss_module, "_add_product_in_float32", added)
    precise = gradient()
    assert calls == [(torch.bfloat16, torch.bfloat16)] * 6
    assert 0 < (rounded - precise).norm() < 1e-2 * precise.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_adds_products_to_float32(dtype):
    assert loss_module.sums_in_float32(torch.device("cuda"), dtype)
