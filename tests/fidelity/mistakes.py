"""Mistakes that a change could bring in: what the bands are worth is what they catch.

Each is a context manager. Those of :data:`LOW_PRECISION` leave float32 as it is, those of :data:`ANY_DTYPE` do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.model import attention, gpt
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim import muon, muon_adamw, schedules
from nanochat_pl.training import module as training
from tests.fidelity import setting

Mistake = Callable[[], AbstractContextManager[Any]]


def _by_row(losses: Tensor) -> tuple[Tensor, Tensor]:
    return losses.sum(), losses.detach().sum(dim=1)


@contextmanager
def softcap_low() -> Iterator[None]:
    """Softcap and cross entropy in the type of the logits."""

    def losses(self: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        raw = self.lm_head(self.hidden(ids))[..., : self.config.vocab_size]
        capped = self.config.softcap * torch.tanh(raw / self.config.softcap)
        return F.cross_entropy(capped.mT, targets, reduction="none").float()

    with (
        patch.object(GPT, "losses", losses),
        patch.object(GPT, "loss_by_row", lambda self, *args: _by_row(losses(self, *args[:2]))),
    ):
        yield


def loss_sum_low() -> AbstractContextManager[Any]:
    """The summed loss of a micro-batch in the type of the activations."""
    whole = GPT.loss_by_row

    def loss_by_row(self: GPT, *args: Any) -> tuple[Tensor, Tensor]:
        total, rows = whole(self, *args)
        return total.to(self.compute_dtype).float(), rows

    return patch.object(GPT, "loss_by_row", loss_by_row)


def norm_low() -> AbstractContextManager[Any]:
    """RMSNorm in the type of its input."""
    return patch.object(gpt, "norm", lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-7).rsqrt())


def softmax_low() -> AbstractContextManager[Any]:
    """The softmax of attention in the type of the scores."""

    def products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
        groups = k.size(1)
        rows = q.unflatten(1, (groups, -1)).flatten(2, 3)
        scores = (rows @ k.transpose(-2, -1)).unflatten(2, (-1, q.size(2))) * scale
        shares = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return (shares.flatten(2, 3) @ v).unflatten(2, (-1, q.size(2))).flatten(1, 2)

    return patch.object(attention, "products", products)


def rotary_low() -> AbstractContextManager[Any]:
    """The angles of the rotary tables in the type of the activations."""
    whole = GPT.set_compute_dtype

    def set_compute_dtype(self: GPT, dtype: torch.dtype) -> GPT:
        whole(self, dtype)
        frequencies = self.config.rotary_base ** -(torch.arange(0, self.config.head_dim, 2) / self.config.head_dim)
        angles = torch.outer(torch.arange(self.config.rotary_reach).to(dtype), frequencies.to(dtype))
        if dtype != torch.float32:
            self.cos, self.sin = angles.cos(), angles.sin()
        return self

    return patch.object(GPT, "set_compute_dtype", set_compute_dtype)


def embeddings_low() -> AbstractContextManager[Any]:
    """Embeddings kept in the type of the activations."""
    whole = setting.model_config
    return patch.object(setting, "model_config", lambda dtype: dataclasses.replace(whole(dtype), embedding_dtype=dtype))


def attention_scale(factor: float, everywhere: bool) -> Mistake:
    """The scale of attention off by a factor."""

    def mistake() -> AbstractContextManager[Any]:
        whole = gpt.windowed_attention

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, **options: Any) -> Tensor:
            wrong = scale * (factor if everywhere or q.dtype == torch.bfloat16 else 1.0)
            return whole(q, k, v, window, wrong, **options)

        return patch.object(gpt, "windowed_attention", attend)

    return mistake


def window_off_by_one() -> AbstractContextManager[Any]:
    """Attention does not see the last position of its window."""
    whole = gpt.windowed_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, **options: Any) -> Tensor:
        return whole(q, k, v, window - 1, scale, **options)

    return patch.object(gpt, "windowed_attention", attend)


def _with_hooks(hook: Callable[[GPT, str, torch.nn.Parameter], None]) -> AbstractContextManager[Any]:
    """Parameters of networks that are born get a hook."""
    whole = GPT.materialise

    def materialise(self: GPT, device: Any = "cpu") -> GPT:
        net = whole(self, device)
        for name, parameter in net.named_parameters():
            hook(net, name, parameter)
        return net

    return patch.object(GPT, "materialise", materialise)


def gradient_scaled(role: str, factor: float, everywhere: bool) -> Mistake:
    """The gradient of one role off by a factor."""

    def hook(net: GPT, name: str, parameter: torch.nn.Parameter) -> None:
        if parameter_roles(net)[name] == role:
            parameter.register_hook(
                lambda g: g * (factor if everywhere or net.compute_dtype == torch.bfloat16 else 1.0)
            )

    return lambda: _with_hooks(hook)


def gradients_summed_low() -> AbstractContextManager[Any]:
    """The gradients of the micro-batches summed in bfloat16."""

    def hook(net: GPT, name: str, parameter: torch.nn.Parameter) -> None:
        def rounded(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if net.compute_dtype == torch.bfloat16:
                parameter.grad.copy_(parameter.grad.bfloat16())

        parameter.register_post_accumulate_grad_hook(rounded)

    return _with_hooks(hook)


def muon_low() -> AbstractContextManager[Any]:
    """All of Polar Express in the type of its products, the norms too."""
    whole = muon.orthogonalize
    return patch.object(muon, "orthogonalize", lambda x, muon, dtype: whole(x.to(dtype), muon, dtype))


def muon_always(used: torch.dtype) -> Mistake:
    """Muon's products in one type, whatever the model computes in."""
    whole = muon.orthogonalize
    return lambda: patch.object(muon, "orthogonalize", lambda x, muon, dtype: whole(x, muon, used))


def kept_low(what: str) -> Mistake:
    """The weights, or a moment of the optimizer, rounded to bfloat16 after each step."""

    def mistake() -> AbstractContextManager[Any]:
        whole = muon_adamw.MuonAdamW.step

        def step(self: Any, closure: Any = None) -> None:
            whole(self, closure)
            with torch.no_grad():
                for tensor in _kept(self, what) if self.muon_dtype == torch.bfloat16 else ():
                    tensor.copy_(tensor.bfloat16())

        return patch.object(muon_adamw.MuonAdamW, "step", step)

    return mistake


def _kept(optimizer: Any, what: str) -> Iterator[Tensor]:
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if what == "weights":
            yield parameter
        elif what in optimizer.state[parameter]:
            yield optimizer.state[parameter][what]


@contextmanager
def schedule_late() -> Iterator[None]:
    """The schedule of the step before."""
    whole = schedules.schedule_values
    with patch.object(
        training, "schedule_values", lambda settings, step, count: whole(settings, max(step - 1, 0), count)
    ):
        yield


LOW_PRECISION: dict[str, Mistake] = {
    "softcap and cross entropy in bfloat16": softcap_low,
    "the loss summed in bfloat16": loss_sum_low,
    "RMSNorm in bfloat16": norm_low,
    "attention's softmax in bfloat16": softmax_low,
    "rotary angles in bfloat16": rotary_low,
    "embeddings kept in bfloat16": embeddings_low,
    "attention's scale × 1.05 in bfloat16": attention_scale(1.05, everywhere=False),
    "attention's scale × 1.01 in bfloat16": attention_scale(1.01, everywhere=False),
    "gradient of the matrices × 1.05 in bfloat16": gradient_scaled("matrix", 1.05, everywhere=False),
    "gradient of lm_head × 1.05 in bfloat16": gradient_scaled("lm_head", 1.05, everywhere=False),
    "micro-batches' gradients summed in bfloat16": gradients_summed_low,
    "Muon's norms in bfloat16": muon_low,
    "Muon in float32 where the model computes in bfloat16": muon_always(torch.float32),
    "weights kept in bfloat16": kept_low("weights"),
    "Muon's momentum kept in bfloat16": kept_low("momentum"),
    "Muon's second moment kept in bfloat16": kept_low("second_moment"),
    "AdamW's first moment kept in bfloat16": kept_low("exp_avg"),
    "AdamW's second moment kept in bfloat16": kept_low("exp_avg_sq"),
}
ANY_DTYPE: dict[str, Mistake] = {
    "attention's scale × 1.05": attention_scale(1.05, everywhere=True),
    "a window off by one": window_off_by_one,
    "gradient of the matrices × 1.05": gradient_scaled("matrix", 1.05, everywhere=True),
    "Muon in bfloat16 where the model computes in float32": muon_always(torch.bfloat16),
    "the schedule a step late": schedule_late,
}


def main() -> None:
    """Print for each mistake what notices it, and the first lines of what was found."""
    from tests.fidelity.metrics import WAYS, warm_up

    warm_up()
    for mistakes, exact in ((LOW_PRECISION, False), (ANY_DTYPE, True)):
        for name, mistake in mistakes.items():
            with mistake():
                ways = [way for way in WAYS if way.startswith("float32") == exact or way.startswith("updates")]
                found = {way: WAYS[way]() for way in ways}
            print(f"{name}: {', '.join(way for way in found if found[way]) or 'NOT NOTICED'}", flush=True)
            for way, lines in found.items():
                for line in lines[:2]:
                    print(f"    {way}: {line}", flush=True)


if __name__ == "__main__":
    main()
