"""What `nanochat-pl bench` does once its settings are read."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nanochat_pl.bundle.bundle import load_bundle, naming_weights
from nanochat_pl.cli._ledger import folder_of_bundle, note_inference
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.device import choose_device, device_name, require_kernels
from nanochat_pl.common.paths import cache_folder
from nanochat_pl.engine.bench import BatchResult, as_plain, measure_batch, measure_limits
from nanochat_pl.engine.compile_choice import engine_for
from nanochat_pl.engine.engine import Engine
from nanochat_pl.model.config import DType
from nanochat_pl.model.counts import kv_cache_bytes

if TYPE_CHECKING:
    from nanochat_pl.cli.bench import BenchConfig


def bench(config: BenchConfig, folder: Path) -> None:
    """Measure the model of a bundle, print it, and note it in the run's ledger."""
    device = choose_device(config.accelerator, "accelerator")
    require_kernels(device)
    bundle = load_bundle(folder, device, config.dtype)
    engine = engine_for(
        bundle, config.quantize, config.compile, max(2, *config.batch_sizes), cache_folder(config.paths)
    )
    facts = {
        "bundle": str(folder),
        "device": device_name(device),
        "dtype": str(engine.net.compute_dtype).removeprefix("torch."),
        "quantize": config.quantize,
        "compile": engine.is_compiled,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
    }
    rank_zero_print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    with naming_weights(bundle):
        limits = measure_limits(engine)
        results = [measure_batch(engine, config, size, limits) for size in config.batch_sizes]
    copied, multiplied = limits.bytes_per_second / 1e9, limits.flops_per_second / 1e9
    print_table(
        ("prompts", "first token, ms", "a token, ms", "tokens/s", "of bandwidth", "of products"),
        [
            (
                result.batch_size,
                result.first_token_ms,
                result.token_ms,
                result.tokens_per_second,
                f"{result.bandwidth_share:.1%}",
                f"{result.product_share:.1%}",
            )
            for result in results
        ],
        f"median (least … most) of {config.repeats}; the machine copies {copied:,.0f} GB/s and multiplies"
        f" {multiplied:,.0f} GFLOP/s in {facts['dtype']}",
    )
    if (stage := folder_of_bundle(folder, Path(config.paths.runs))) is not None:
        note_inference(stage, _inference(config, engine, results), {"host": socket.gethostname(), **facts})
    print(json.dumps({**facts, "limits": as_plain(limits), "batches": [as_plain(result) for result in results]}))


def _inference(config: BenchConfig, engine: Engine, results: Sequence[BatchResult]) -> dict[str, float]:
    """What the ledger says of inference: of the smallest batch, and tokens a second of the others too."""
    first, *others = sorted(results, key=lambda result: result.batch_size)
    dtype = cast(DType, str(engine.net.compute_dtype).removeprefix("torch."))
    # A cache has some room whatever its length: a token's bytes are what a longer one takes more.
    length = 2**20
    caches = [kv_cache_bytes(engine.net.config, 1, tokens, dtype) for tokens in (length, 2 * length)]
    return {
        "batch_size": first.batch_size,
        "first_token_ms": first.first_token_ms.median,
        "token_ms": first.token_ms.median,
        "tokens_per_second": first.tokens_per_second.median,
        **{f"tokens_per_second_at_{each.batch_size}": each.tokens_per_second.median for each in others},
        "cache_bytes_per_token": (caches[1] - caches[0]) / length,
    }
