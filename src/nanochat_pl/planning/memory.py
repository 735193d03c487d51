"""How much memory a training step takes, from the architecture alone.

N tokens of a micro-batch, C model width, Q and K widths of all query heads and of all key/value heads, H and G their
numbers, M width inside the feed-forward part, V vocabulary, c bytes of the compute type; float32 has 4.

What is in memory when, on one device:

- always: the parameters (float32; embeddings in their own type), the rotary tables, the optimizer's state (two moments
  of 4 bytes for AdamW's parameters, one for Muon's); from the second micro-batch of a step on, all gradients;
- in the forward, what autograd keeps for the backward, layer by layer (:func:`kept_by_layer`); with activation
  checkpointing only what goes into each layer;
- in the loss, for a piece of the tokens at a time, what is made of its logits (:func:`loss_piece_bytes`), and the
  gradients of the hidden states and of the head, which are computed there;
- in the backward, at a layer: what earlier layers keep, what it keeps itself (computed again under checkpointing), the
  temporaries of its widest operation (the square in the feed-forward part: :func:`backward_temporaries`), and the
  gradients of all later layers;
- in the optimizer's step: all gradients, and stacked copies of the largest group of matrices, be it Muon's or the
  classic one's (:func:`optimizer_temporaries`). No activations are left then.

The peak is the largest of these. It holds for eager execution; a compiled model fuses operations and keeps less
(:data:`COMPILED_SHARE`, on a GPU). Not in it: a GPU's context and fragmentation; :data:`MARGIN` is for them.
Measured against largest resident sizes on a CPU (docs/LOG.md); on a GPU the terms are the same and unmeasured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from nanochat_pl.common.schema import setting
from nanochat_pl.model.config import GPTConfig
from nanochat_pl.model.counts import DTYPE_BYTES, count_parameters, default_chunk_tokens, rotary_bytes, weight_bytes
from nanochat_pl.model.query_blocks import PRODUCTS_REACH, band_blocks
from nanochat_pl.optim.pieces import adamw_quantum

FLOAT = 4
# What a first step of any size loads on a CPU: code and tables of the libraries, measured with a model of some kB.
CPU_LIBRARIES = 48 * 2**20
# Share of a device's memory that the plan leaves free.
MARGIN = 0.1
# Of what an eager layer keeps from forward to backward, what a compiled one keeps: norms and the square of the
# feed-forward part are computed again. An estimate, not measured; where it is too low, memory runs out in the first
# step, which is then done again with half the rows.
COMPILED_SHARE = 0.9


@dataclass(frozen=True)
class MemoryKnobs:
    """What trades time for memory without changing results."""

    activation_checkpointing: bool = setting(False, "Keep only what goes into each layer; compute the rest again.")
    loss_chunk_tokens: int | None = setting(None, "Tokens whose logits are in memory at once.", at_least=1)
    compiled: bool = setting(False, "The model is compiled, which keeps less of each layer; on a GPU only.")


NO_KNOBS = MemoryKnobs()


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step on one device.

    Attributes:
        rotary: both tables.
        optimizer_state: moments.
        activations: what autograd keeps from forward to backward.
        logits: of one piece of the loss, with what is made of them.
        head_gradients: those that the loss computes in the forward, of head and hidden states.
        optimizer_temporaries: of the optimizer's step.
        libraries: code and tables that a first step loads.
        phases: name of each phase that may be the largest → its bytes above weights, rotary tables and libraries.
    """

    weights: int
    rotary: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    head_gradients: int
    optimizer_temporaries: int
    libraries: int
    phases: dict[str, int]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def above_model(self) -> int:
        """The peak of a step above what the built model takes: what ``benchmarks/peak_memory.py`` measures."""
        return self.phases[self.peak_phase] + self.libraries

    @property
    def total(self) -> int:
        return self.weights + self.rotary + self.above_model


def step_memory(
    config: GPTConfig,
    rows: int,
    *,
    on_cpu: bool,
    knobs: MemoryKnobs = NO_KNOBS,
    micro_batches: int = 1,
    processes: int = 1,
    gpu_memory: int | None = None,
) -> StepMemory:
    """Memory of a training step.

    Args:
        config: the architecture, with the compute type.
        rows: of a micro-batch (``device_batch_size``).
        on_cpu: attention and norm take other ways there than on a GPU.
        micro_batches: of a step; from the second on the gradients are there during forward and backward.
        gpu_memory: of a GPU of its own, which the loss cuts its pieces by.
        processes: that share the optimizer's state. In its step each has all parameters gathered in place of gradients.
    """
    tokens, compute = rows * config.sequence_len, DTYPE_BYTES[config.compute_dtype]
    stream = tokens * config.width * compute
    of_eager = COMPILED_SHARE if knobs.compiled and not on_cpu else 1.0
    layers = [int(of_eager * kept_by_layer(config, layer, rows, on_cpu)) for layer in range(config.num_layers)]
    # What goes into the first layer is kept anyway.
    kept = [0] + [stream] * (config.num_layers - 1) if knobs.activation_checkpointing else layers
    outside = _kept_outside(config, rows, on_cpu, knobs.activation_checkpointing)
    state, gradients = optimizer_state_bytes(config, processes), weight_bytes(config)
    of_head = FLOAT * config.padded_vocab_size * config.width
    # Below float32 the head is cast; on a CPU each piece's gradient of it is a tensor of its own before it is added.
    cast_head = compute * config.vocab_size * config.width if compute < FLOAT else 0
    piece = loss_piece_bytes(config, tokens, knobs.loss_chunk_tokens, on_cpu, gpu_memory)
    activations = outside + sum(kept)
    there = state + (gradients if micro_batches > 1 else 0)
    phases = {
        # Hidden states and their gradients.
        "loss": there + activations + 2 * stream + of_head + cast_head + (max(piece, cast_head) if on_cpu else piece),
        # What the loss has computed, and the same scaled.
        "backward of the loss": there + activations + 2 * (stream + of_head),
        "backward of the layers": there + _backward_peak(config, rows, layers, kept, outside, micro_batches > 1),
        "optimizer": state + gradients + optimizer_temporaries(config),
    }
    return StepMemory(
        weights=weight_bytes(config),
        rotary=rotary_bytes(config),
        gradients=gradients,
        optimizer_state=state,
        activations=activations,
        logits=piece,
        head_gradients=of_head + stream,
        optimizer_temporaries=optimizer_temporaries(config),
        libraries=CPU_LIBRARIES if on_cpu else 0,
        phases=phases,
    )


def largest_device_batch_size(
    config: GPTConfig,
    memory_bytes: int,
    *,
    on_cpu: bool,
    knobs: MemoryKnobs,
    at_most: int,
    gpu_memory: int | None = None,
    processes: int = 1,
) -> int:
    """The most rows whose step fits into a device's memory less :data:`MARGIN`; 0 where not one does.

    A CPU's memory also takes the copy of which a resume file is written.

    Args:
        memory_bytes: of the device.
        gpu_memory: the same for a GPU of its own, as in :func:`step_memory`.
        at_most: rows of a step on one device; a micro-batch of all of them needs no gradients beside the forward.
        processes: that share the optimizer's state.
    """
    copy = resume_copy_bytes(config) if on_cpu else 0

    def fits(rows: int) -> bool:
        parts = 2 if rows < at_most else 1
        needed = step_memory(
            config,
            rows,
            on_cpu=on_cpu,
            knobs=knobs,
            micro_batches=parts,
            processes=processes,
            gpu_memory=gpu_memory,
        )
        return needed.total + copy <= (1 - MARGIN) * memory_bytes

    if fits(at_most):
        return at_most
    low, high = 0, at_most  # low fits (or is none), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def kept_by_layer(config: GPTConfig, layer: int, rows: int, on_cpu: bool) -> int:
    """Bytes that autograd keeps of one layer: what tests compare with ``saved_tensors_hooks``.

    Per token: the layer's input (c·C, scaled by the residual lambda; the first layer's is kept anyway); two norms, each
    with its input (float32 on a CPU) and a float32 number, and their outputs as inputs of the linears (c·C each); the
    norms of queries and keys; the value embedding (c·K) with its gate; attention; and 2·c·M of the squared relu.
    Below float32 also the layer's matrices, cast to the compute type.
    """
    compute = DTYPE_BYTES[config.compute_dtype]
    width, mlp = config.width, config.mlp_width
    heads, kv_heads, head = config.num_heads, config.num_kv_heads, config.head_dim
    per_token = compute * width if config.residual_lambdas and layer > 0 else 0
    per_token += 2 * (_norm_bytes(config, width, 1, on_cpu) + compute * width)
    per_token += _norm_bytes(config, heads * head, heads, on_cpu) + _norm_bytes(
        config, kv_heads * head, kv_heads, on_cpu
    )
    if layer in config.value_embedding_layers:
        per_token += compute * kv_heads * (head + 2)
    per_token += 2 * compute * mlp
    cast = compute * _matrix_parameters(config, layer) if compute < FLOAT else 0
    masks = _mask_bytes(config, layer, rows, on_cpu)
    return rows * (config.sequence_len * per_token + _attention_bytes(config, layer, on_cpu)) + masks + cast


def _norm_bytes(config: GPTConfig, width: int, groups: int, on_cpu: bool) -> int:
    """Per token: a norm's input and the float32 factor of each group. A CPU keeps the input in float32."""
    return (FLOAT if on_cpu else DTYPE_BYTES[config.compute_dtype]) * width + FLOAT * groups


def _attention_bytes(config: GPTConfig, layer: int, on_cpu: bool) -> int:
    """Per row: what attention keeps, with the input of the linear behind it."""
    compute, length, window = DTYPE_BYTES[config.compute_dtype], config.sequence_len, config.windows[layer]
    queries = config.num_heads * config.head_dim * length
    output = compute * queries
    products, documents = on_cpu and length <= PRODUCTS_REACH, config.document_start_id is not None
    if (
        not products and not documents and window >= length - 1
    ):  # one fused call: queries, keys, values, its output, one sum per query
        keys = config.num_kv_heads * config.head_dim * length
        return compute * (queries + 2 * keys) + FLOAT * config.num_heads * length + output
    seen, pairs = _seen_and_pairs(length, window, products)
    if products:  # per block copies of its queries, keys and values; the shares in float32, and cast where that differs
        copies = compute * (queries + 2 * config.num_kv_heads * config.head_dim * seen)
        return copies + config.num_heads * pairs * (FLOAT + (compute if compute < FLOAT else 0)) + output
    keys = config.num_kv_heads * config.head_dim * length
    return compute * (queries + 2 * keys) + FLOAT * config.num_heads * length + 2 * output


def _mask_bytes(config: GPTConfig, layer: int, rows: int, on_cpu: bool) -> int:
    """Masks of the band: a byte per query and key, in the fused kernels a number. They are the same for all rows, but
    where documents are kept apart each row has its own."""
    length, window = config.sequence_len, config.windows[layer]
    products, documents = on_cpu and length <= PRODUCTS_REACH, config.document_start_id is not None
    if not products and not documents and window >= length - 1:
        return 0
    pairs = _seen_and_pairs(length, window, products)[1]
    return (rows if documents else 1) * pairs * (1 if products else DTYPE_BYTES[config.compute_dtype])


@lru_cache
def _seen_and_pairs(length: int, window: int, with_products: bool) -> tuple[int, int]:
    """Keys that the blocks of a band take, and pairs of a query and a key."""
    blocks = band_blocks(length, window, with_products)
    seen = sum(stop - first for _, stop, first in blocks)
    return seen, sum((stop - start) * (stop - first) for start, stop, first in blocks)


def _kept_outside(config: GPTConfig, rows: int, on_cpu: bool, checkpointing: bool) -> int:
    """What autograd keeps besides the layers: ids and targets, the norms of the embedding and of the last hidden states
    with their inputs; the embedding and the same moved by one position (smear), and what the layers begin with (the
    first residual); the middle of the stream (backout), where it is not the input of a layer that is kept anyway; where
    documents are kept apart, where they begin, and where their positions begin again, rotary tables for each row.
    """
    compute, width = DTYPE_BYTES[config.compute_dtype], config.width
    inputs_kept = config.residual_lambdas or checkpointing
    streams = 2 * (config.smear_channels > 0) + inputs_kept
    streams += config.backout and (not inputs_kept or config.num_layers // 2 == config.num_layers - 1)
    per_token = 2 * 8 + 2 * _norm_bytes(config, width, 1, on_cpu) + streams * compute * width
    per_token += (config.document_start_id is not None) + config.restart_positions * compute * config.head_dim
    return rows * config.sequence_len * per_token


def loss_piece_bytes(
    config: GPTConfig, tokens: int, chunk_tokens: int | None, on_cpu: bool, gpu_memory: int | None = None
) -> int:
    """Of a piece's logits: tanh and exponentials (which become the gradient) in float32; below float32 also the logits
    and the gradient in the compute type. Where there are several pieces, the gradient of the one before is still there.
    """
    compute = DTYPE_BYTES[config.compute_dtype]
    chunk = min(tokens, chunk_tokens or default_chunk_tokens(config.vocab_size, on_cpu, gpu_memory))
    pieces = -(-tokens // chunk)
    per_logit = 2 * FLOAT + (2 * compute if compute < FLOAT else 0) + (compute if pieces > 1 else 0)
    return -(-tokens // pieces) * config.vocab_size * per_logit


def _backward_peak(
    config: GPTConfig, rows: int, layers: list[int], kept: list[int], outside: int, accumulated: bool
) -> int:
    """The largest moment of the layers' backward."""
    stream = rows * config.sequence_len * config.width * DTYPE_BYTES[config.compute_dtype]
    done = 0 if accumulated else FLOAT * config.padded_vocab_size * config.width
    peak, before = 0, sum(kept)
    for layer in reversed(range(config.num_layers)):
        # The gradients of the stream itself, of the middle (backout) and of the first residual.
        before -= kept[layer]
        moment = outside + before + layers[layer] + 3 * stream + backward_temporaries(config, rows)
        peak = max(peak, moment + done)
        done += 0 if accumulated else FLOAT * _matrix_parameters(config, layer) + _value_embedding_bytes(config, layer)
    return peak


def backward_temporaries(config: GPTConfig, rows: int) -> int:
    """Of the square in the feed-forward part: the gradient that comes, the one that goes, and two on the way.

    What the linear behind it has kept, c·M per token, is free by then.
    """
    return 3 * rows * config.sequence_len * config.mlp_width * DTYPE_BYTES[config.compute_dtype]


def optimizer_state_bytes(config: GPTConfig, processes: int = 1) -> int:
    """Moments: 8 bytes per parameter of AdamW; of Muon 4, and 4 per row or column (the longer side).

    Of several processes the share of the one that has most: groups of matrices are divided at whole matrices, other
    parameters at whole pieces.
    """
    parameters, with_embedding = count_parameters(config), len(config.value_embedding_layers)
    embedding = parameters["value_embeds"] // max(1, with_embedding)
    tables = [parameters["wte"], parameters["lm_head"], *[embedding] * with_embedding]
    of_adamw = 8 * (parameters["scalars"] + sum(_largest_share(numel, processes) for numel in tables))
    shapes = _matrix_shapes(config).items()
    of_muon = sum(-(-count // processes) * (prod(shape) + max(shape)) for shape, count in shapes)
    return of_adamw + FLOAT * of_muon


def _largest_share(numel: int, processes: int) -> int:
    """Elements of a parameter of AdamW that a process has at most."""
    quantum = adamw_quantum(numel)
    return min(numel, -(-numel // (quantum * processes)) * quantum)


def resume_copy_bytes(config: GPTConfig) -> int:
    """Host memory of the main process while it writes a resume file: a copy of all weights and moments."""
    return weight_bytes(config) + optimizer_state_bytes(config)


def optimizer_temporaries(config: GPTConfig) -> int:
    """Of the largest Muon group, K matrices (m, n) with m <= n: copies of values and gradients in float32; in the type
    of the products the matrices, their next iterate, the Gram matrix (m, m) and the polynomial of it. Below float32 the
    first cast is wider where m is small: a float32 matrix beside the cast one.
    """
    compute = DTYPE_BYTES[config.compute_dtype]
    largest = 0
    for (rows, columns), count in _matrix_shapes(config).items():
        size, gram = count * rows * columns, count * min(rows, columns) ** 2
        iterating = 2 * compute * (size + gram)
        casting = (FLOAT + (compute if compute < FLOAT else FLOAT)) * size
        largest = max(largest, 2 * FLOAT * size + max(iterating, casting))
    embeddings = count_parameters(config)
    if config.embedding_dtype != "float32":  # updated in float32 copies
        largest = max(largest, 2 * FLOAT * embeddings["wte"], 2 * FLOAT * embeddings["value_embeds"])
    return largest


def _matrix_shapes(config: GPTConfig) -> Counter[tuple[int, int]]:
    """Shapes of Muon's matrices, with their numbers: one group each."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Counter[tuple[int, int]] = Counter()
    for rows, columns in ((queries, config.width), (config.width, queries), *[(keys, config.width)] * 2):
        shapes[rows, columns] += config.num_layers
    for rows, columns in ((config.mlp_width, config.width), (config.width, config.mlp_width)):
        shapes[rows, columns] += config.num_layers
    if config.value_embedding_layers:
        shapes[config.num_kv_heads, config.value_gate_channels] += len(config.value_embedding_layers)
    return shapes


def _matrix_parameters(config: GPTConfig, layer: int) -> int:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    gate = config.num_kv_heads * config.value_gate_channels if layer in config.value_embedding_layers else 0
    return config.width * (2 * queries + 2 * keys + 2 * config.mlp_width) + gate


def _value_embedding_bytes(config: GPTConfig, layer: int) -> int:
    if layer not in config.value_embedding_layers:
        return 0
    return DTYPE_BYTES[config.embedding_dtype] * config.padded_vocab_size * config.num_kv_heads * config.head_dim
