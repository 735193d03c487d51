"""What a model costs, from its config alone: parameters, FLOPs, bytes. No tensor is made."""

from __future__ import annotations

from nanochat_pl.common.errors import UserError
from nanochat_pl.model.config import KEY_GRID, SMALL_PRODUCT, DType, GPTConfig

DTYPE_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Logits of a piece. 16 MiB of float32 on a CPU: small enough for malloc to use the same memory again, measured fastest.
# A GPU needs long matrices to be busy: 1,024 tokens of a vocabulary of 32,768, and 4,096 where the 2 GB that they take
# are a small share of its memory (not measured).
PIECE_LOGITS_CPU, PIECE_LOGITS_GPU, PIECE_LOGITS_LARGE_GPU = 2**22, 2**25, 2**27
LARGE_GPU = 40 * 2**30


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters by group, named as in ``golden/plan.json``; ``total`` is their sum.

    ``scalars`` are the residual lambdas, the smear gate and the smear and backout factors.
    """
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.width * (2 * query_width + 2 * kv_width)
    gates = len(config.value_embedding_layers) * config.value_gate_channels * config.num_kv_heads
    groups = {
        "wte": config.padded_vocab_size * config.width,
        "value_embeds": len(config.value_embedding_layers) * config.padded_vocab_size * kv_width,
        "lm_head": config.padded_vocab_size * config.width,
        "transformer_matrices": config.num_layers * (attention + 2 * config.width * config.mlp_width) + gates,
        "scalars": (2 * config.num_layers if config.residual_lambdas else 0)
        + (config.smear_channels + 1 if config.smear_channels else 0)
        + int(config.backout),
    }
    return {**groups, "total": sum(groups.values())}


def count_linear_weights(config: GPTConfig) -> int:
    """Weights of the linear maps of the blocks and of the head: the multiplications of a token, attention aside."""
    parameters = count_parameters(config)
    return parameters["transformer_matrices"] + parameters["lm_head"]


def flops_per_token(config: GPTConfig) -> int:
    """Floating point operations to train on one token: forward and backward, matrix products only.

    Six per parameter of every linear (two forward, four backward), and for attention twelve per head channel and
    visible key (``golden/plan.json``). Where documents are kept apart this is the most that it can be, since
    their lengths are no part of a config.
    """
    linears = count_linear_weights(config) + config.smear_channels
    visible = sum(min(window, config.sequence_len) for window in config.windows)
    return 6 * linears + 12 * config.num_heads * config.head_dim * visible


def weight_bytes(config: GPTConfig) -> int:
    """Bytes of the parameters as they are kept: float32, the embeddings in ``embedding_dtype``."""
    parameters = count_parameters(config)
    embeddings = parameters["wte"] + parameters["value_embeds"]
    return 4 * (parameters["total"] - embeddings) + DTYPE_BYTES[config.embedding_dtype] * embeddings


def rotary_bytes(config: GPTConfig) -> int:
    """Bytes of the two rotary tables, at most (they are kept in the compute dtype)."""
    return 4 * config.rotary_reach * config.head_dim


def kv_cache_bytes(config: GPTConfig, num_slots: int, max_len: int, dtype: DType = "float32") -> int:
    """Bytes of a :class:`~nanochat_pl.model.kv_cache.KVCache`: keys and values of all layers, and the token ids."""
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * DTYPE_BYTES[dtype]
    return num_slots * (cache_length(config, max_len) * per_position + 8 * max_len)


def cache_length(config: GPTConfig, max_len: int) -> int:
    """Positions that a slot of a cache for ``max_len`` tokens has memory for."""
    return -(-max(max_len, least_keys(config.num_heads * config.head_dim)) // KEY_GRID) * KEY_GRID


def least_keys(width: int) -> int:
    """Keys that so many numbers of queries (heads times queries times head width) are at least held against, so that
    their products are no small ones: see :data:`~nanochat_pl.model.config.SMALL_PRODUCT`."""
    return SMALL_PRODUCT // width + 1


def default_chunk_tokens(vocab_size: int, on_cpu: bool, gpu_memory: int | None = None) -> int:
    """Tokens whose logits are in memory at once, where nobody says otherwise. ``gpu_memory``: bytes that a GPU has."""
    large = (gpu_memory or 0) >= LARGE_GPU
    logits = PIECE_LOGITS_CPU if on_cpu else PIECE_LOGITS_LARGE_GPU if large else PIECE_LOGITS_GPU
    return max(1, logits // vocab_size)


def require_size(config: GPTConfig, limit_bytes: int) -> None:
    """Refuse a config whose network would take more than ``limit_bytes``, before it takes any.

    Raises:
        UserError: it would.
    """
    needed = weight_bytes(config) + rotary_bytes(config)
    if needed > limit_bytes:
        raise UserError(
            f"The model has {count_parameters(config)['total']:,} parameters and would take"
            f" {needed / 2**30:,.1f} GiB, above the limit of {limit_bytes / 2**30:,.1f} GiB."
        )
