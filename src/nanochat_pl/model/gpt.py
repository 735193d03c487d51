"""The network: a pre-norm decoder with rotary positions, gated value embeddings, smear and backout.

Shapes: B rows, T positions, C model width, H query heads, G key/value heads, D head width, V vocabulary.

A ``GPT`` is born on the meta device and costs nothing; :meth:`GPT.materialise` gives it memory, then
``init.init_weights`` or ``load_state_dict`` gives it values. Parameters are kept in float32 and cast to the type of the
activations where they are used. Names in the state dict are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.device import gpu_memory_bytes
from nanochat_pl.common.errors import UserError
from nanochat_pl.model.attention import windowed_attention
from nanochat_pl.model.config import AttentionBackend, DType, GPTConfig
from nanochat_pl.model.counts import default_chunk_tokens
from nanochat_pl.model.decode_step import DecodeStep
from nanochat_pl.model.fp8 import Fp8Backend, suits_fp8
from nanochat_pl.model.kv_cache import CacheStep, KVCache
from nanochat_pl.model.layers import MLP, Embedding, Linear, norm, without_gradient
from nanochat_pl.model.loss import fused_linear_cross_entropy, softcap, token_losses
from nanochat_pl.model.packed_rows import PackedRows
from nanochat_pl.model.prefix_tree import PrefixTree
from nanochat_pl.model.rotary import rotary_tables, rotate

TORCH_DTYPES: dict[DType, torch.dtype] = {name: getattr(torch, name) for name in get_args(DType)}

# What a forward may go over besides whole rows.
Step: TypeAlias = CacheStep | PrefixTree | DecodeStep | PackedRows


class Attention(nn.Module):
    """Causal attention of one layer, with its window and, on some layers, its gated value embedding."""

    wanted: AttentionBackend = "auto"  # backend for what it can compute

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.windows[layer]
        # Queries and keys both carry qk_scale; on the scores that is its square.
        self.scale = config.qk_scale**2 * config.head_dim**-0.5
        self.gate_channels, self.gate_scale = config.value_gate_channels, config.value_gate_scale
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.c_q = Linear(config.width, query_width)
        self.c_k = Linear(config.width, kv_width)
        self.c_v = Linear(config.width, kv_width)
        self.c_proj = Linear(query_width, config.width)
        if layer in config.value_embedding_layers:
            self.ve_gate = Linear(self.gate_channels, config.num_kv_heads)

    def forward(
        self, x: Tensor, value_embedding: Tensor | None, rotary: tuple[Tensor, Tensor], step: Step | None
    ) -> Tensor:
        """x (B, T, C) normed, value_embedding (B, T, G·D) → (B, T, C)."""
        q, k, v = (each.transpose(1, 2) for each in self.project(x, value_embedding, rotary))
        if step is None:
            y = windowed_attention(q, k, v, self.window, self.scale, wanted=self.wanted)
        else:
            y = step.attend(self.layer, q, k, v, self.window, self.scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def project(
        self, x: Tensor, value_embedding: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, G, D) of x (B, T, C)."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            v = self.add_embedding(v, self.ve_gate(x[..., : self.gate_channels]), value_embedding)
        return norm(rotate(q, *rotary)), norm(rotate(k, *rotary)), v

    def add_embedding(self, v: Tensor, gate: Tensor, value_embedding: Tensor) -> Tensor:
        """Values (B, T, G, D) with the gated embedding (B, T, G·D) added; gate (B, T, G) before the sigmoid."""
        gate = self.gate_scale * torch.sigmoid(gate)
        return v + gate[..., None] * value_embedding.view_as(v)


class Block(nn.Module):
    """Attention, then the feed-forward part, each on the normed residual stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, value_embedding: Tensor | None, rotary: tuple[Tensor, Tensor], step: Step | None
    ) -> Tensor:
        x = x + self.attn(norm(x), value_embedding, rotary, step)
        return x + self.mlp(norm(x))


def run_layer(
    block: nn.Module,
    values: Embedding | None,
    lambdas: tuple[Tensor, Tensor] | None,
    x: Tensor,
    first: Tensor,
    ids: Tensor,
    rotary: tuple[Tensor, Tensor],
    step: Step | None = None,
) -> Tensor:
    """One layer: mix the first residual into x, then the block. x, first, result (B, T, C), ids (B, T).

    It knows nothing of its number, so what is compiled of it serves all layers of its kind.
    """
    if lambdas is not None:
        x = lambdas[0] * x + lambdas[1] * first
    value_embedding = None if values is None else values(ids).to(x.dtype)
    return cast(Tensor, block(x, value_embedding, rotary, step))


def run_layer_again(*arguments: Any) -> Tensor:
    """As :func:`run_layer`, but nothing is kept for the backward: the layer is computed again there."""
    # Nothing random is in a block, so no generator has to be kept.
    return cast(Tensor, checkpoint(run_layer, *arguments, use_reentrant=False, preserve_rng_state=False))


class GPT(nn.Module):
    """The language model of a :class:`GPTConfig`.

    Args:
        config: the architecture.
        compute_dtype: type of the activations; ``config.compute_dtype`` by default.
        activation_checkpointing: for training keep only what goes into each block, and compute the rest of it again in
            the backward.
        loss_chunk_tokens: tokens whose logits are in memory at once in the loss; None: as suits vocabulary and device.
        attention: the backend of attention over whole rows, for what it can compute.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: GPTConfig,
        compute_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
        loss_chunk_tokens: int | None = None,
        attention: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.activation_checkpointing = activation_checkpointing
        self.loss_chunk_tokens = loss_chunk_tokens
        self.compute_dtype = compute_dtype or TORCH_DTYPES[config.compute_dtype]
        kept = TORCH_DTYPES[config.embedding_dtype]
        with torch.device("meta"):
            if config.residual_lambdas:
                self.resid_lambdas = nn.Parameter(torch.empty(config.num_layers))
                self.x0_lambdas = nn.Parameter(torch.empty(config.num_layers))
            if config.smear_channels:
                self.smear_lambda = nn.Parameter(torch.empty(1))
            if config.backout:
                self.backout_lambda = nn.Parameter(torch.empty(1))
            self.transformer = nn.ModuleDict(
                {
                    "wte": Embedding(config.padded_vocab_size, config.width, kept),
                    "h": nn.ModuleList(Block(config, layer) for layer in range(config.num_layers)),
                }
            )
            self.lm_head = Linear(config.width, config.padded_vocab_size)
            if config.smear_channels:
                self.smear_gate = Linear(config.smear_channels, 1)
            kv_width = config.num_kv_heads * config.head_dim
            self.value_embeds = nn.ModuleDict(
                {str(i): Embedding(config.padded_vocab_size, kv_width, kept) for i in config.value_embedding_layers}
            )
            table = torch.empty(config.rotary_reach, config.head_dim // 2, dtype=self.compute_dtype)
        for block in self.blocks:
            cast(Attention, block.attn).wanted = attention
        self.register_buffer("cos", table, persistent=False)
        self.register_buffer("sin", table.clone(), persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.transformer["h"])

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def head_weight(self) -> Tensor:
        """The head's weight as it was trained: (V or more, C)."""
        return cast(Tensor, self.lm_head.weight)

    def materialise(self, device: torch.device | str = "cpu") -> GPT:
        """Take memory on ``device``. Parameters hold NaN until they are initialised or loaded, so none is forgotten."""
        self.to_empty(device=device)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(torch.nan)
        self.set_compute_dtype(self.compute_dtype)
        return self

    def set_compute_dtype(self, dtype: torch.dtype) -> GPT:
        """Set the type of the activations and make the rotary tables in it."""
        self.compute_dtype = dtype
        cos, sin = rotary_tables(self.config)
        self.cos, self.sin = (table.to(device=self.device, dtype=dtype) for table in (cos, sin))
        return self

    def enable_fp8(self, backend: Fp8Backend) -> int:
        """Let the blocks' linear maps that suit it multiply in FP8 where gradients are computed; gives their number."""
        linears = [each for each in self.blocks.modules() if isinstance(each, Linear) and suits_fp8(each.weight)]
        for each in linears:
            each.fp8 = backend
        return len(linears)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            ids: int64 (B, T).
            cache: continue its slots (B of them) with these tokens, and add the tokens to it.
            lengths: with a cache: real tokens of each right-padded row; all T by default.
            last_only: only at each row's last real position.

        Returns:
            float32 (B, T, V); with ``last_only`` (B, V). Those of padding (and of rows with length 0) mean nothing.

        Raises:
            UserError: positions past the rotary tables or the cache, before anything is computed.
        """
        x = self.hidden(ids, cache, lengths)
        if last_only:
            if lengths is None:
                x = x[:, -1]
            else:
                last = (torch.as_tensor(lengths) - 1).clamp(min=0).to(x.device)
                x = x[torch.arange(x.size(0), device=x.device), last]
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """Hidden (…, C) → float32 logits (…, V)."""
        return softcap(self._raw_logits(x), self.config.softcap)

    def _raw_logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)[..., : self.config.vocab_size]

    def hidden(
        self, ids: Tensor, cache: KVCache | None = None, lengths: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """What the head reads: (B, T, C) in the compute dtype, normed. Arguments as in :meth:`forward`."""
        if ids.size(1) > self.config.rotary_reach:
            raise UserError(
                f"{ids.size(1):,} positions in a row: the model's rotary tables end at {self.config.rotary_reach:,}."
            )
        if cache is None:
            return self._hidden(ids, self.packed(ids))
        step = cache.begin(ids, lengths)
        x = self._hidden(ids, step)
        step.commit()
        return x

    def packed(self, ids: Tensor) -> PackedRows | None:
        """Where the documents of rows (B, T) begin, if they are to be kept apart."""
        if self.config.document_start_id is None:
            return None
        return PackedRows(ids, self.config, self.compute_dtype, self.attention)

    def hidden_of_tree(self, tree: PrefixTree) -> Tensor:
        """What the head reads at each token of rows that branch: (1, N, C), as :meth:`hidden`."""
        return self._hidden(tree.ids, tree)

    def _hidden(self, ids: Tensor, step: Step | None) -> Tensor:
        first = self.begin(ids, step)
        # Where there is no backward, nothing is kept for one.
        whole_rows = step is None or isinstance(step, PackedRows)
        again = self.activation_checkpointing and whole_rows and torch.is_grad_enabled()
        run = run_layer_again if again else run_layer
        return self.end(*self.through_layers([run] * self.config.num_layers, first, first, ids, step))

    def through_layers(
        self, runs: Sequence[Callable[..., Tensor]], x: Tensor, first: Tensor, ids: Tensor, step: Step | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the last layer and the one in the middle give, (B, T, C) each.

        Args:
            runs: of each layer what runs it: :func:`run_layer`, or the same compiled.
            x, first: both what :meth:`begin` gives.
            ids: int64 (B, T).
        """
        rotary, lambdas = self.rotary(ids.size(1), step), self.lambdas()
        middle = first
        for layer, block in enumerate(self.blocks):
            x = runs[layer](block, self.value_embedding(layer), lambdas[layer], x, first, ids, rotary, step)
            if layer == self.config.num_layers // 2:
                middle = x
        return x, middle

    def begin(self, ids: Tensor, step: Step | None = None) -> Tensor:
        """What goes into the first layer: ids int64 (B, T) → (B, T, C)."""
        if not self.config.smear_channels:
            return self.embed(ids)
        if not isinstance(step, CacheStep):
            x = self.embed(ids)
            return self._smear(x, F.pad(x, (0, 0, 1, -1)) if step is None else step.previous(x))
        x = self.embed(step.with_previous())
        if (exists := step.has_previous()) is not None:
            x = torch.cat([x[:, :1] * exists[:, None, None], x[:, 1:]], dim=1)
        return self._smear(x[:, 1:], x[:, :-1])

    def end(self, x: Tensor, middle: Tensor) -> Tensor:
        """What the head reads, of what the last layer and the one in the middle give; all (B, T, C)."""
        if self.config.backout:
            # With two layers the middle is the end, and the norm takes the factor out again: its gradient is rounding.
            still = self.config.num_layers <= 2
            x = x - (without_gradient(self.backout_lambda) if still else self.backout_lambda).to(x.dtype) * middle
        return norm(x)

    def lambdas(self) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Of each layer the factors () on the stream and on the first residual; None: there are none."""
        if not self.config.residual_lambdas:
            return [None] * self.config.num_layers
        return list(zip(self.resid_lambdas.unbind(), self.x0_lambdas.unbind(), strict=True))

    def value_embedding(self, layer: int) -> Embedding | None:
        """That of a layer; None: it has none."""
        return cast(Embedding, self.value_embeds[str(layer)]) if layer in self.config.value_embedding_layers else None

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target: ids and targets int64 (B, T) → float32 (B, T), 0 where the target is ignored."""
        chunk = self._chunk_tokens()
        pieces = (tensor.split(chunk) for tensor in (self.hidden(ids).flatten(0, 1), targets.flatten()))
        losses = [token_losses(self._raw_logits(x), goal, self.config.softcap) for x, goal in zip(*pieces, strict=True)]
        return torch.cat(losses).view_as(targets)

    def weighted_loss(self, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum over the targets of weight times nats, a float32 scalar. The caller divides by its count of targets.

        Args:
            ids, targets: int64 (B, T); ``IGNORE_INDEX`` where nothing is to be learnt.
            weights: float32 (B, T), ones by default.
        """
        return self.loss_by_row(ids, targets, weights)[0]

    def loss_by_row(self, ids: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`weighted_loss`, and what each row has of it: float32 (B,), without gradients."""
        if weights is None:
            weights = torch.ones_like(targets, dtype=torch.float32)
        if not torch.is_grad_enabled():
            nats = self.losses(ids, targets) * weights
            return nats.sum(), nats.sum(dim=1)
        return self.loss_of_hidden(self.hidden(ids), targets, weights)[:2]

    def loss_by_token(self, ids: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`loss_by_row` with gradients, and the nats of each target: float32 (B, T), without weights and
        gradients; those of ignored targets mean nothing."""
        return self.loss_of_hidden(self.hidden(ids), targets, weights)

    def loss_of_hidden(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`loss_by_token`, of what the head reads, (B, T, C)."""
        total, nats = fused_linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            weights.flatten(),
            vocab_size=self.config.vocab_size,
            cap=self.config.softcap,
            chunk_tokens=self._chunk_tokens(),
        )
        nats = nats.view_as(targets)
        return total, (torch.where(targets != IGNORE_INDEX, weights, 0.0) * nats).sum(dim=1), nats

    def _chunk_tokens(self) -> int:
        return self.loss_chunk_tokens or default_chunk_tokens(
            self.config.vocab_size, self.device.type == "cpu", gpu_memory_bytes(self.device)
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Normed embeddings in the compute type: int64 (…) → (…, C)."""
        return norm(self.transformer["wte"](ids).to(self.compute_dtype))

    def rotary(self, num_positions: int, step: Step | None) -> tuple[Tensor, Tensor]:
        """Tables for the positions at hand: (T, 1, D/2), or (B, T, 1, D/2) where each row has its own."""
        index = slice(num_positions) if step is None else step.positions
        return self.cos[index].unsqueeze(-2), self.sin[index].unsqueeze(-2)

    def _smear(self, x: Tensor, previous: Tensor) -> Tensor:
        """Mix a gated share of the embedding of the token before into each position. Both (B, T, C), normed."""
        gate = torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))
        return x + self.smear_lambda.to(x.dtype) * gate * previous
