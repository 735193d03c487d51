"""Products in FP8 against plain arithmetic, against bfloat16, compiled, and where they are off."""

from __future__ import annotations

import pytest
import torch

from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.fp8 import (
    GRADIENT_DTYPE,
    INPUT_DTYPE,
    distance_of_kernels,
    fp8_linear,
    quantize,
    suits_fp8,
    why_no_fp8,
)
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.layers import Linear


def why_no_kernels() -> str:
    """What PyTorch says to a product in FP8 on this CPU; empty: it has one, slow but the same arithmetic."""
    square, one = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(())
    try:
        torch._scaled_mm(square, square.t(), one, one, out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


needs_kernels = pytest.mark.skipif(bool(why_no_kernels()), reason=why_no_kernels() or "there are kernels")
SCALED_MM = pytest.param("scaled_mm", marks=needs_kernels)
BACKENDS = ["emulate", SCALED_MM]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_and_gradients(function, x, weight, given) -> list[torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), given)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [INPUT_DTYPE, GRADIENT_DTYPE])
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_quantize_uses_the_whole_range_of_the_type_whatever_the_magnitude(dtype, magnitude):
    x = normal(64, 32) * magnitude
    quantized, scale = quantize(x, dtype)
    assert quantized.float().abs().max() == torch.finfo(dtype).max
    # Relative to each value half a unit in its last place: 3 digits after the point in e4m3, 2 in e5m2.
    normal_numbers = quantized.float().abs() >= torch.finfo(dtype).smallest_normal
    error = (quantized.float() * scale - x).abs() / x.abs()
    assert error[normal_numbers].max() <= {INPUT_DTYPE: 2.0**-4, GRADIENT_DTYPE: 2.0**-3}[dtype] * 1.001


@pytest.mark.parametrize("dtype", [INPUT_DTYPE, GRADIENT_DTYPE])
def test_quantize_of_zeros_is_zeros(dtype):
    quantized, scale = quantize(torch.zeros(4, 4), dtype)
    assert not quantized.float().any()
    assert torch.isfinite(scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients_are_products_of_the_quantized_tensors(backend):
    x, weight, given = normal(2, 48, 128), normal(256, 128, seed=1), normal(2, 48, 256, seed=2)
    found = output_and_gradients(lambda *inputs: fp8_linear(*inputs, backend), x, weight, given)

    def rounded(tensor, dtype):
        quantized, scale = quantize(tensor, dtype)
        return quantized.double() * scale.double()

    x8, w8 = rounded(x, INPUT_DTYPE), rounded(weight, INPUT_DTYPE)
    g8 = rounded(given, GRADIENT_DTYPE)
    expected = [x8 @ w8.T, g8 @ w8, g8.flatten(0, 1).T @ x8.flatten(0, 1)]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert distance(one, other) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_are_those_of_the_plain_product(backend):
    x, weight, given = normal(32, 128).bfloat16(), normal(128, 128), normal(32, 128).bfloat16()
    found = output_and_gradients(lambda *inputs: fp8_linear(*inputs, backend), x, weight, given)
    assert [each.dtype for each in found] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_errors_are_those_of_the_roundings():
    """Of normal numbers: e4m3 rounds by some 2.6 % of a value, e5m2 by twice that, and errors of factors add up."""
    x, weight, given = normal(512, 256), normal(384, 256, seed=1), normal(512, 384, seed=2)
    exact = output_and_gradients(lambda x, weight: x @ weight.T, x, weight, given)
    found = output_and_gradients(lambda *inputs: fp8_linear(*inputs, "emulate"), x, weight, given)
    output, of_x, of_weight = (distance(*pair) for pair in zip(found, exact, strict=True))
    assert 0.03 < output < 0.045
    assert 0.05 < of_x < 0.075
    assert 0.05 < of_weight < 0.075


@needs_kernels
def test_the_kernels_of_this_pytorch_agree_with_the_emulation():
    assert distance_of_kernels(torch.device("cpu")) < 5e-3


@pytest.mark.gpu
def test_the_kernels_of_the_gpu_agree_with_the_emulation():
    device = torch.device("cuda")
    reason = why_no_fp8(device, torch.bfloat16, 128)
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip(str(reason))
    assert reason is None
    assert distance_of_kernels(device) < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(backend, value):
    x, weight, given = normal(16, 128), normal(128, 128), normal(16, 128)
    given[3, 4] = value
    _, of_x, of_weight = output_and_gradients(lambda *inputs: fp8_linear(*inputs, backend), x, weight, given)
    assert not torch.isfinite(of_x).all()
    assert not torch.isfinite(of_weight).all()
    x[3, 4] = value
    y, _, _ = output_and_gradients(lambda *inputs: fp8_linear(*inputs, backend), x, weight, normal(16, 128))
    assert not torch.isfinite(y).all()


@pytest.mark.parametrize(
    ("shape", "suits"), [((128, 128), True), ((512, 144), True), ((128, 96), False), ((136, 128), False)]
)
def test_which_weights_are_multiplied_in_fp8(shape, suits):
    assert suits_fp8(torch.empty(shape, device="meta")) == suits


def small_net(depth: int = 2) -> GPT:
    """Layers of width 128, the smallest whose matrices suit FP8; no weight is zero."""
    settings = ModelSettings(depth=depth, aspect_ratio=128 // depth, head_dim=64, sequence_len=32)
    net = init_weights(GPT(resolve_model(settings, 100, "bfloat16")).materialise(), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return net


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(100, (2, 33), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def loss_and_gradients(net: GPT, loss_by_row) -> list[torch.Tensor]:
    loss, of_rows = loss_by_row(*rows())
    return [loss.detach(), of_rows, *torch.autograd.grad(loss, list(net.parameters()))]


def distance_of_gradients(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of all together, after :func:`loss_and_gradients`."""
    return distance(*(torch.cat([each.flatten().float() for each in of[2:]]) for of in (found, expected)))


def test_in_a_network_the_blocks_matrices_are_and_evaluation_and_sampling_do_not_change_a_bit():
    net, plain = small_net(), small_net()
    assert net.enable_fp8("emulate") == 6 * net.config.num_layers
    others = [name for name, each in net.named_modules() if isinstance(each, Linear) and each.fp8 is None]
    assert others == ["transformer.h.1.attn.ve_gate", "lm_head", "smear_gate"]
    assert net.state_dict().keys() == plain.state_dict().keys()
    inputs, targets = rows()
    with torch.no_grad():
        assert net(inputs).equal(plain(inputs))
        assert net.losses(inputs, targets).equal(plain.losses(inputs, targets))
    found, expected = (loss_and_gradients(each, each.loss_by_row) for each in (net, plain))
    assert not found[0].equal(expected[0]), "with gradients the products are others"
    assert distance(found[0], expected[0]) < 1e-2
    assert distance_of_gradients(found, expected) < 0.15


@pytest.mark.parametrize(
    ("backend", "checkpointing", "compiler"),
    [
        pytest.param("emulate", True, "eager", marks=pytest.mark.slow),
        pytest.param("emulate", False, "inductor", marks=pytest.mark.slow),
        pytest.param("scaled_mm", True, "aot_eager", marks=[pytest.mark.slow, needs_kernels]),
    ],
)
def test_compiled_without_a_break_it_is_the_same(backend, checkpointing, compiler, monkeypatch):
    torch.compiler.reset()
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, fullgraph=True, backend=compiler, **options)
    )
    net = small_net(depth=1)
    net.activation_checkpointing = checkpointing
    net.enable_fp8(backend)
    expected = loss_and_gradients(net, net.loss_by_row)
    found = loss_and_gradients(net, CompiledLoss(net))
    torch.compiler.reset()
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)
    # Of all together: one number by itself, as a gate's, is a sum that cancels, and its roundings are the machine's.
    assert distance_of_gradients(found, expected) < 2e-2


def test_says_why_not():
    cpu = torch.device("cpu")
    assert why_no_fp8(cpu, torch.bfloat16, 128) == "it is for GPUs of NVIDIA"
    assert "bfloat16, not in float16" in str(why_no_fp8(cpu, torch.float16, 128))
    assert "multiple of 16, not 100" in str(why_no_fp8(cpu, torch.bfloat16, 100))


@pytest.mark.parametrize(
    ("capability", "kernels", "reason"),
    [
        ((8, 6), lambda device: 0.0, "compute capability 8.9, the GPU has 8.6"),
        ((9, 0), lambda device: 0.0, None),
        ((9, 0), lambda device: 0.5, "5.0e-01 off"),
        ((12, 0), lambda device: torch.empty(2).view(3), "do not run here: shape '[3]' is invalid"),
    ],
)
def test_of_a_gpu_its_generation_and_its_kernels_decide(monkeypatch, capability, kernels, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("nanochat_pl.model.fp8.distance_of_kernels", kernels)
    found = why_no_fp8(torch.device("cuda"), torch.bfloat16, 128)
    assert found is None if reason is None else reason in str(found)
