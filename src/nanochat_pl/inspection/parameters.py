"""The weights of a model in numbers: sizes by role, singular values of the matrices, factors of the layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.roles import parameter_roles


@dataclass(frozen=True)
class ParameterSummary:
    """The parameters of one role.

    Attributes:
        role: as :func:`~nanochat_pl.model.roles.parameter_roles` names it.
        num_tensors, num_parameters: how many there are.
        rms: root mean square of all of them.
        largest: largest absolute value.
    """

    role: str
    num_tensors: int
    num_parameters: int
    rms: float
    largest: float


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix.

    Attributes:
        kind: what the matrix is for: ``attn.c_q``, ``mlp.c_fc``, ``value_embeds``, ``wte``, ``lm_head`` …
        layer: which layer it is in; None: in none.
        values: float32, in descending order.
    """

    kind: str
    layer: int | None
    values: Tensor

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over the squared largest singular value: 1 … number of values; 0 for a zero matrix."""
        largest = float(self.values[0])
        return float(self.values.square().sum()) / largest**2 if largest else 0.0


def parameter_summaries(net: GPT) -> list[ParameterSummary]:
    """Number and size of the parameters of each role, in the model's order."""
    groups: dict[str, list[Tensor]] = {}
    roles = parameter_roles(net)
    for name, parameter in net.named_parameters():
        groups.setdefault(roles[name], []).append(parameter.detach().float())
    summaries = []
    for role, tensors in groups.items():
        count = sum(tensor.numel() for tensor in tensors)
        squares = sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in tensors)
        largest = max(float(tensor.abs().max()) for tensor in tensors)
        summaries.append(ParameterSummary(role, len(tensors), count, (squares / count) ** 0.5, largest))
    return summaries


@torch.inference_mode()
def spectra(net: GPT) -> list[Spectrum]:
    """Singular values of every matrix with more than one row, embeddings included, in the model's order."""
    found = []
    for name, parameter in net.named_parameters():
        if parameter.ndim == 2 and min(parameter.shape) > 1:
            kind, layer = _kind_and_layer(name)
            found.append(Spectrum(kind, layer, torch.linalg.svdvals(parameter.detach().float()).cpu()))
    return found


def _kind_and_layer(name: str) -> tuple[str, int | None]:
    name = name.removeprefix("transformer.").removesuffix(".weight")
    if match := re.fullmatch(r"h\.(\d+)\.(.+)|(value_embeds)\.(\d+)", name):
        return match[2] or match[3], int(match[1] or match[4])
    return name, None


def layer_factors(net: GPT) -> dict[str, list[float]]:
    """The learnt scalar factors by name: ``resid_lambdas`` and ``x0_lambdas`` one a layer, ``smear_lambda`` and
    ``backout_lambda`` one in all. Those that the architecture lacks are left out."""
    return {
        name: parameter.tolist() for name, parameter in net.named_parameters() if name.endswith(("lambdas", "lambda"))
    }


@torch.inference_mode()
def nearest_tokens(table: Tensor, token_id: int, count: int = 8) -> list[tuple[int, float]]:
    """The tokens whose rows in a table (V, C) point most nearly the same way as a token's.

    Args:
        table: an embedding, ``net.transformer["wte"].weight`` without its padding, or the head's weight.

    Returns:
        (id, cosine) of the ``count`` nearest others, nearest first.

    Raises:
        UserError: there is no such token.
    """
    if not 0 <= token_id < len(table):
        raise UserError(f"token_id={token_id}: must be 0 … {len(table) - 1:,}.")
    directions = torch.nn.functional.normalize(table.detach().float(), dim=1)
    cosines = directions @ directions[token_id]
    cosines[token_id] = -torch.inf
    best = cosines.topk(min(count, len(table) - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
