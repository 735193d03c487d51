"""A network for inference: the same model with its weights kept in the type that it computes in, in fewer products.

It shares the code of the forward with :class:`GPT`, and the memory of every weight that has the right type anyway. What
it computes is the same but for the rounding of matrix products of another shape: in bfloat16 on the CPUs seen so far
no bit, in float32 the last digits, as between one row and many. With weights of 8 bits it is another, rougher model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.config import Quantize
from nanochat_pl.model.gpt import GPT, Attention, Step
from nanochat_pl.model.layers import Linear, linear, norm
from nanochat_pl.model.rotary import rotate_whole, whole_tables

# Linear maps of attention that read the same input, in the order of their outputs in one product.
PROJECTIONS = ("c_q", "c_k", "c_v", "ve_gate")
# Parameters that are no matrices. The first two are cast where they are used, the others are numbers of the kernels.
FACTORS = ("smear_lambda", "backout_lambda", "resid_lambdas", "x0_lambdas")


class KeptLinear(nn.Module):
    """Linear maps of one input as one product, their weights kept in the type of the activations.

    Args:
        sources: each reads the first channels of the input, as many as it has; their outputs stand side by side.
        dtype: of the activations.
        num_outputs: so many of the outputs are of interest; None: all.
        by_inputs: the weights of an input stand together in memory, a copy always. In float32 that is faster for a few
            rows, and rounds in other places.
    """

    def __init__(
        self, sources: Sequence[Linear], dtype: torch.dtype, num_outputs: int | None = None, by_inputs: bool = False
    ) -> None:
        super().__init__()
        self._sources, self._dtype, self._num_outputs = tuple(sources), dtype, num_outputs
        self._by_inputs = by_inputs
        self.refresh()

    def refresh(self) -> None:
        """Take the weights as they are now."""
        weights = [source.weight.detach() for source in self._sources]
        if len(weights) > 1:
            width = max(weight.size(1) for weight in weights)
            # Zeros for the channels that a source does not read change no sum.
            weights = [torch.cat([F.pad(weight, (0, width - weight.size(1))) for weight in weights])]
        self.keep(weights[0][: self._num_outputs])

    def keep(self, weight: Tensor) -> None:
        """Keep a weight (outputs, inputs); in the right type it is not copied."""
        self._weight = weight.to(self._dtype)
        if self._by_inputs:
            self._weight = self._weight.t().contiguous().t()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.dtype != torch.float32 and x.numel() == x.size(-1):
            # Of one row a compiler makes a faster product in 16 bits than the libraries have.
            y = (x.view(1, -1).float() * self._weight.float()).sum(dim=-1)
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return linear(x, self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)  # there are no hooks to look for, and this is called for every token


class Int8Linear(KeptLinear):
    """The same with weights of 8 bits and a factor for each output. The activations are bfloat16 in the product: for
    float32 PyTorch's kernel is slow."""

    def keep(self, weight: Tensor) -> None:
        factors = (weight.float().abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self._weight = (weight.float() / factors[:, None]).round_().to(torch.int8)
        self._factors = factors.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        return torch._weight_int8pack_mm(rows, self._weight, self._factors).view(*x.shape[:-1], -1).to(x.dtype)


class FusedAttention(Attention):
    """Attention with one product for queries, keys, values and gate; queries and keys are rotated and normed together.

    Args:
        source: where the settings are from.
        qkv: what gives queries, keys, values and, where there is a value embedding, the gate.
        c_proj: as of :class:`Attention`.
    """

    qkv: nn.Module

    def __init__(self, source: Attention, qkv: nn.Module, c_proj: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_dim, self.window, self.scale = source.layer, source.head_dim, source.window, source.scale
        self.gate_scale = source.gate_scale
        query_width, kv_width = source.c_q.weight.size(0), source.c_k.weight.size(0)
        self._num_heads, self._ends = (
            query_width // source.head_dim,
            (query_width + kv_width, query_width + 2 * kv_width),
        )
        heads: Any = self
        heads.qkv, heads.c_proj = qkv, c_proj

    def project(
        self, x: Tensor, value_embedding: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As of :class:`Attention`, with the tables of :func:`whole_tables`."""
        y = self.qkv(x)
        first, second = self._ends  # of queries and keys, and of values
        shape = (*y.shape[:2], -1, self.head_dim)
        both = norm(rotate_whole(y[..., :first].view(shape), *rotary))
        v = y[..., first:second].view(shape)
        if value_embedding is not None:
            v = self.add_embedding(v, y[..., second:], value_embedding)
        return both[:, :, : self._num_heads], both[:, :, self._num_heads :], v


class InferenceGPT(GPT):
    """A network that generates with the weights of another one, on its device and in its compute type.

    Where a copy is kept of weights, each forward notices when a training has changed them (their tensors count their
    changes), and takes them again; :meth:`refresh` does so at once.

    Args:
        source: the network. Weights of the right type are shared with it.
        quantize: int8: the weights of all linear maps have 8 bits. Faster for one stream on a CPU, and less exact.
        for_compiling: keep weights as suits the compiled step of CPUs: in float32, where they would be shared, as
            copies.

    Raises:
        UserError: ``quantize`` on another device than a CPU.
    """

    def __init__(self, source: GPT, quantize: Quantize | None = None, for_compiling: bool = False) -> None:
        if quantize is not None and source.device.type != "cpu":
            raise UserError(
                f"quantize={quantize}: is for CPUs, and the model is on {source.device.type}.",
                fix="Leave it out, or set accelerator=cpu.",
            )
        super().__init__(source.config, source.compute_dtype)
        self.quantize = quantize
        self._source = (source,)  # in a tuple it is no part of this module
        dtype, kind = source.compute_dtype, Int8Linear if quantize == "int8" else KeptLinear
        by_inputs = for_compiling and dtype == torch.float32 and source.device.type == "cpu"

        def kept(sources: Sequence[Linear], num_outputs: int | None = None) -> KeptLinear:
            return kind(sources, dtype, num_outputs, by_inputs)

        modules: list[tuple[Any, Any]] = list(zip(self.blocks, source.blocks, strict=True))
        for ours, theirs in modules:
            linears = [getattr(theirs.attn, name) for name in PROJECTIONS if hasattr(theirs.attn, name)]
            ours.attn = FusedAttention(theirs.attn, kept(linears), kept([theirs.attn.c_proj]))
            ours.mlp.c_fc, ours.mlp.c_proj = kept([theirs.mlp.c_fc]), kept([theirs.mlp.c_proj])
        heads: Any = self
        heads.lm_head = kept([source.lm_head], source.config.vocab_size)
        if source.config.smear_channels:
            heads.smear_gate = KeptLinear([source.smear_gate], dtype)
        self.transformer["wte"], self.value_embeds = source.transformer["wte"], source.value_embeds
        self._tables = whole_tables(source.cos, source.sin)
        for name in FACTORS:
            self._parameters.pop(name, None)
        del self.cos, self.sin
        self.refresh()

    @property
    def device(self) -> torch.device:
        return self._source[0].device

    @property
    def head_weight(self) -> Tensor:
        return self._source[0].head_weight

    @property
    def weights_version(self) -> list[int]:
        """Equal as long as the weights are the same."""
        return self._changes()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights of the source as they are now."""
        source = self._source[0]
        for module in self.modules():
            if isinstance(module, KeptLinear):
                module.refresh()
        for name in FACTORS[:2]:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name).detach().to(self.compute_dtype))
        self._factors = source.lambdas()
        self._watched = list(source.parameters())
        self._seen = self._changes()

    def lambdas(self) -> Sequence[tuple[Tensor, Tensor] | None]:
        return self._factors

    def rotary(self, num_positions: int, step: Step | None) -> tuple[Tensor, Tensor]:
        """As of :class:`GPT`, with both halves of the channels: (T, 1, D) or (B, T, 1, D)."""
        tables = self._tables[slice(num_positions) if step is None else step.positions]
        return tables[..., :1, :], tables[..., 1:, :]

    def notice_changes(self) -> None:
        """Take the weights of the source if they were changed in place."""
        if self._changes() != self._seen:
            self.refresh()

    def _hidden(self, ids: Tensor, step: Step | None) -> Tensor:
        self.notice_changes()
        return super()._hidden(ids, step)

    def _changes(self) -> list[int]:
        """How often each weight of the source has been changed in place."""
        return [0 if each.is_inference() else each._version for each in self._watched]


def inference_net(net: GPT, quantize: Quantize | None = None, for_compiling: bool = False) -> GPT:
    """A network for inference with the weights of ``net``: itself where it is one or stands in for a network."""
    return (
        InferenceGPT(net, quantize, for_compiling)
        if isinstance(net, GPT) and not isinstance(net, InferenceGPT)
        else net
    )
