"""What a model is: :class:`GPTConfig`, every number resolved, and how settings become one.

The config knows no eras. What differs between generations of the architecture is a field (``smear_channels=0`` is a
model without smear), so the code of the forward never asks which recipe a checkpoint comes from. Source: golden/era_*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.tokenizer.bpe import SPECIAL_TOKENS

DType = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8"]
# How attention over whole rows is computed: see model/attention.
AttentionBackend = Literal["auto", "products", "sdpa", "varlen", "flex", "bands"]
MAX_LAYERS = 1_000

# Rotary tables reach this many training lengths, so that long prompts can be scored and continued.
ROTARY_REACH = 10
# Ranges of keys over a cache begin and end at multiples of it (model/attention.py), and so does its memory.
KEY_GRID = 16
# Up to so many multiplications PyTorch does a product in bfloat16 on a CPU with another kernel, which rounds sums
# elsewhere (mkldnn_gemm_min_size, aten/src/ATen/native/mkldnn/Matmul.cpp). One token has to get the bits of many.
SMALL_PRODUCT = 16 * 16 * 16


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, resolved: enough to build the network, with nothing derived and nothing named.

    Bounds are wide for models and narrow for attacks: :func:`nanochat_pl.common.schema.build` checks them, so that
    a hostile ``config.json`` is refused before any memory is taken (see also ``accounting.require_size``).
    """

    vocab_size: int = setting(doc="Tokens of the tokenizer: columns of the logits.", at_least=1, at_most=2**21)
    padded_vocab_size: int = setting(doc="Rows of the embedding and the head.", at_least=1, at_most=2**21)
    num_layers: int = setting(doc="Blocks.", at_least=1, at_most=MAX_LAYERS)
    num_heads: int = setting(doc="Query heads.", at_least=1, at_most=2**10)
    num_kv_heads: int = setting(doc="Key and value heads; query head h uses h // (heads / kv heads).", at_least=1)
    head_dim: int = setting(doc="Width of a head.", at_least=2, at_most=2**12)
    width: int = setting(doc="Width of the residual stream.", at_least=1, at_most=2**16)
    mlp_width: int = setting(doc="Width inside the feed-forward part.", at_least=1, at_most=2**18)
    sequence_len: int = setting(doc="Positions of a training row.", at_least=1, at_most=2**22)
    windows: tuple[Annotated[int, Field(ge=0, le=2**26)], ...] = setting(
        doc="Per layer: how many earlier positions a query sees besides its own.", max_length=MAX_LAYERS
    )
    rotary_base: float = setting(doc="Base of the rotary frequencies.", above=0.0, at_most=1e12)
    rotary_reach: int = setting(doc="Positions in the rotary tables.", at_least=1, at_most=2**26)
    rotary_bfloat16: bool = setting(doc="Whether the rotary tables are rounded to bfloat16.")
    softcap: float = setting(doc="Logits are softcap * tanh(logits / softcap).", above=0.0, at_most=64.0)
    qk_scale: float = setting(doc="Factor on the normed queries and on the normed keys.", above=0.0, at_most=1e3)
    smear_channels: int = setting(doc="Inputs of the smear gate; 0 = no smear.", at_least=0, at_most=2**16)
    backout: bool = setting(doc="Whether the middle of the residual stream is taken off its end.")
    residual_lambdas: bool = setting(doc="Whether each layer scales the residual and adds the embedding again.")
    value_embedding_layers: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        doc="Layers whose values get an embedding of the token added.", max_length=MAX_LAYERS
    )
    value_gate_channels: int = setting(doc="Inputs of the value embedding's gate.", at_least=1, at_most=2**16)
    value_gate_scale: float = setting(doc="The gate is this times a sigmoid.", above=0.0, at_most=1e3)
    embedding_dtype: DType = setting("float32", "Type in which the embeddings are kept.")
    compute_dtype: DType = setting("float32", "Type of the activations, unless the user of the model asks for another.")
    document_start_id: Annotated[int, Field(ge=0)] | None = setting(
        None,
        "The token that begins a document: in rows without a cache, attention and smear do not look past it; null: they"
        " do.",
    )
    restart_positions: bool = setting(False, "Whether rotary positions begin again where such a document does.")

    def __post_init__(self) -> None:
        problems = []
        if self.document_start_id is not None and self.document_start_id >= self.vocab_size:
            problems.append(f"document_start_id={self.document_start_id}: must be below vocab_size={self.vocab_size}.")
        if self.restart_positions and self.document_start_id is None:
            problems.append("restart_positions=true: needs a document_start_id.")
        if self.padded_vocab_size < self.vocab_size:
            problems.append(f"padded_vocab_size={self.padded_vocab_size}: is below vocab_size={self.vocab_size}.")
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads={self.num_kv_heads}: does not divide num_heads={self.num_heads}.")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim}: must be even, rotary turns pairs.")
        if len(self.windows) != self.num_layers:
            problems.append(f"windows: has {len(self.windows)} entries for num_layers={self.num_layers}.")
        layers = self.value_embedding_layers
        if list(layers) != sorted(set(layers)) or any(layer >= self.num_layers for layer in layers):
            problems.append(
                f"value_embedding_layers={list(layers)}: must be rising layer numbers below {self.num_layers}."
            )
        if layers and self.value_gate_channels > self.width:
            problems.append(f"value_gate_channels={self.value_gate_channels}: is above width={self.width}.")
        if self.smear_channels > self.width:
            problems.append(f"smear_channels={self.smear_channels}: is above width={self.width}.")
        if self.rotary_reach < self.sequence_len:
            problems.append(f"rotary_reach={self.rotary_reach}: is below sequence_len={self.sequence_len}.")
        if problems:
            raise UserError(problems)


@dataclass(frozen=True)
class InitSettings:
    """The first weights of a fresh model. All linears that write into the residual stream begin at zero.

    What else is a linear, and value embeddings like the value linear of their layer, is drawn by ``linears``:
    ``uniform`` within ±sqrt(3 / width), that is of variance 1 / width, or ``normal`` with the standard deviation
    min(1, sqrt(outputs / inputs)) / sqrt(inputs).
    """

    wte_std: float = setting(0.8, "Standard deviation of the token embedding (normal).", at_least=0.0)
    lm_head_std: float = setting(0.001, "Standard deviation of the head (normal); 0 = zeros.", at_least=0.0)
    linears: Literal["uniform", "normal"] = setting("uniform", "How the linears in the blocks are drawn.")
    mlp_scale: float = setting(0.4, "Factor on the first linear of the feed-forward part.", at_least=0.0)
    gate_max: float = setting(0.02, "Weights of the gates are uniform from 0 to this; 0 = zeros.", at_least=0.0)
    resid_first: float = setting(1.15, "Residual factor of the first layer …")
    resid_last: float = setting(1.05, "… changing linearly to that of the last.")
    x0_first: float = setting(0.20, "Factor on the embedding at the first layer …")
    x0_last: float = setting(0.05, "… changing linearly to that of the last.")
    smear: float = setting(0.0, "Factor of the smear.")
    backout: float = setting(0.2, "Factor of the backout.")


@dataclass(frozen=True)
class ModelSettings:
    """The config group ``model``: a dial, and what may be set besides it. The defaults are the current recipe's.

    A generation of the recipe is a file of configs/model that sets the keys from ``vocab_multiple`` on; any mixture of
    them is a model, too.
    """

    depth: int = setting(12, "Number of blocks: the one dial; all else follows.", at_least=1, at_most=MAX_LAYERS)
    aspect_ratio: int = setting(64, "Width per block, before rounding up to whole heads.", at_least=1, at_most=2**12)
    head_dim: int = setting(128, "Width of an attention head; even.", at_least=2, at_most=2**12)
    num_kv_heads: int | None = setting(
        None, "Key and value heads; null = as many as query heads, fewer = grouped queries.", at_least=1
    )
    sequence_len: int = setting(2048, "Positions of a training row.", at_least=1, at_most=2**22)
    embedding_dtype: DType = setting("float32", "Type in which the embeddings are kept.")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Type of the activations; auto = bfloat16 where the hardware has it, float16 on GPUs that have that alone, else"
        " float32.",
    )
    vocab_multiple: int = setting(
        64, "Rows of embedding and head are padded to a multiple of this; 1 = no padding.", at_least=1, at_most=2**12
    )
    window_pattern: str = setting(
        "SSSL",
        "Attention windows, tiled over the layers: S = short, L = the whole row; the last is L.",
        max_length=1000,
    )
    short_window_divisor: int = setting(4, "S is the row divided by this …", at_least=1, at_most=2**22)
    short_window_multiple: int | None = setting(
        128,
        "… and rounded up to a multiple of this; null = rounded down to whole positions.",
        at_least=1,
        at_most=2**22,
    )
    rotary_base: float = setting(100_000.0, "Base of the rotary frequencies.", above=0.0, at_most=1e12)
    rotary_bfloat16: bool = setting(False, "Round the rotary tables to bfloat16, whatever is computed in.")
    softcap: float = setting(15.0, "Logits are softcap * tanh(logits / softcap).", above=0.0, at_most=64.0)
    qk_scale: float = setting(1.2, "Factor on the normed queries and on the normed keys.", above=0.0, at_most=1e3)
    smear_channels: int = setting(
        24,
        "Channels that the gate of the smear reads (it mixes the token before into each); at most the width; 0 = none.",
        at_least=0,
        at_most=2**16,
    )
    backout: bool = setting(True, "Take a share of the middle of the residual stream off its end.")
    residual_lambdas: bool = setting(True, "Each layer scales the residual stream and adds the embedding again.")
    value_embeddings: bool = setting(True, "Every other layer, the last one too, adds an embedding to its values.")
    value_gate_channels: int = setting(
        12, "Channels that the gate of a value embedding reads; at most the width.", at_least=1, at_most=2**16
    )
    value_gate_scale: float = setting(3.0, "That gate is this times a sigmoid.", above=0.0, at_most=1e3)
    document_mask: bool = setting(
        False, "Attention and the smear do not look from one document of a packed row into another."
    )
    restart_positions: bool = setting(
        False, "Rotary positions begin again at the start of each document; for document_mask=true."
    )
    init: InitSettings = setting(factory=InitSettings, doc="First weights; its keys: --help model.init.")

    def __post_init__(self) -> None:
        problems = []
        if self.restart_positions and not self.document_mask:
            problems.append("restart_positions=true: needs document_mask=true.")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            problems.append(f"window_pattern={self.window_pattern!r}: must be letters S and L, at least one.")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim}: must be even, rotary turns pairs.")
        if self.num_kv_heads is not None and num_heads(self) % self.num_kv_heads:
            problems.append(
                f"num_kv_heads={self.num_kv_heads}: does not divide the {num_heads(self)} query heads"
                f" of depth={self.depth}."
            )
        if problems:
            raise UserError(problems)


def num_heads(settings: ModelSettings) -> int:
    """Query heads: ``depth * aspect_ratio`` rounded up to whole heads."""
    return -(-settings.depth * settings.aspect_ratio // settings.head_dim)


def short_window(settings: ModelSettings) -> int:
    """What the letter S means: the row divided by ``short_window_divisor``, rounded."""
    row, divisor, multiple = settings.sequence_len, settings.short_window_divisor, settings.short_window_multiple
    return row // divisor if multiple is None else -(-row // (divisor * multiple)) * multiple


def window_sizes(settings: ModelSettings) -> tuple[int, ...]:
    """Windows per layer: the pattern tiled over the layers, the last one the whole row."""
    pattern, size = settings.window_pattern, {"S": short_window(settings), "L": settings.sequence_len}
    return (*(size[pattern[i % len(pattern)]] for i in range(settings.depth - 1)), size["L"])


def resolve_model(settings: ModelSettings, vocab_size: int, compute_dtype: DType) -> GPTConfig:
    """The architecture that the settings mean, every number resolved.

    Args:
        settings: the config group ``model``.
        vocab_size: of the tokenizer.
        compute_dtype: what ``settings.compute_dtype`` came to on this machine (``hardware.choose_compute_dtype``).

    Raises:
        UserError: settings that do not fit each other.
    """
    heads = num_heads(settings)
    width = heads * settings.head_dim
    # Every other layer, counted back from the last, so that the last has one at any depth.
    every_other = tuple(range((settings.depth - 1) % 2, settings.depth, 2))
    return GPTConfig(
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // settings.vocab_multiple) * settings.vocab_multiple,
        num_layers=settings.depth,
        num_heads=heads,
        num_kv_heads=settings.num_kv_heads or heads,
        head_dim=settings.head_dim,
        width=width,
        mlp_width=4 * width,
        sequence_len=settings.sequence_len,
        windows=window_sizes(settings),
        rotary_base=settings.rotary_base,
        rotary_reach=ROTARY_REACH * settings.sequence_len,
        rotary_bfloat16=settings.rotary_bfloat16,
        softcap=settings.softcap,
        qk_scale=settings.qk_scale,
        smear_channels=min(settings.smear_channels, width),
        backout=settings.backout,
        residual_lambdas=settings.residual_lambdas,
        value_embedding_layers=every_other if settings.value_embeddings else (),
        value_gate_channels=min(settings.value_gate_channels, width),
        value_gate_scale=settings.value_gate_scale,
        embedding_dtype=settings.embedding_dtype,
        compute_dtype=compute_dtype,
        **_documents(settings, vocab_size),
    )


def with_documents_of(settings: ModelSettings, config: GPTConfig) -> GPTConfig:
    """An architecture with what settings say of documents in packed rows: each stage may choose it anew."""
    return replace(config, **_documents(settings, config.vocab_size))


def _documents(settings: ModelSettings, vocab_size: int) -> dict[str, Any]:
    # Special tokens have the last ids, and the first of them begins each document and conversation.
    start_id = max(vocab_size - len(SPECIAL_TOKENS), 0) if settings.document_mask else None
    return {"document_start_id": start_id, "restart_positions": settings.restart_positions}
