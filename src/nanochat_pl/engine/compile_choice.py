"""Whether a compiled decode step is faster on this machine: tried once with the model itself, and remembered."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.device import cpu_model
from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.data.cache.content_cache import fingerprint_of, read_sealed, write_sealed
from nanochat_pl.engine.bench import random_prompts
from nanochat_pl.engine.engine import Engine, Model
from nanochat_pl.model.config import Quantize

NEW_TOKENS, REPEATS = 17, 3
# What it has to be faster by, with one row and with several: less is within the noise of the measurement.
LEAST_GAIN = 1.05


def engine_for(
    bundle: Model, quantize: Quantize | None, compile: bool | Literal["auto"], rows: int, cache: Path
) -> Engine:
    """An engine whose decode step is compiled where that was asked for, or is faster here.

    Args:
        bundle, quantize: as :class:`Engine` has them.
        compile: auto: in float32 on a CPU, whether it is faster on this machine is tried, which takes some seconds, and
            remembered. In bfloat16 no bit of an answer depends on the others, which a compiled step does not keep, and
            on GPUs what graphs gain was not measured: there it is eager.
        rows: what it is tried with, besides a single row.
        cache: folder of what is remembered.

    Raises:
        UserError: as :class:`Engine`.
    """
    if compile != "auto":
        return Engine(bundle, quantize, compile)
    net = bundle.net
    if quantize is not None or net.device.type != "cpu" or net.compute_dtype != torch.float32:
        return Engine(bundle, quantize)
    path = cache / "decode" / f"{_fingerprint(bundle, rows)}.json"
    try:
        one, several = map(float, read_sealed(path)["times_as_fast"])
    except (UserError, LookupError, TypeError, ValueError):  # not tried yet, or damaged: it can be tried again
        rank_zero_print("Trying whether a compiled decode step is faster here (compile=auto, once; some seconds) …")
        try:
            one, several = (_times_as_fast(bundle, each) for each in (1, rows))
        except NotFiniteError:
            raise
        except UserError as error:
            rank_zero_print(f"The decode step is not compiled: {error.problems[0].removeprefix('compile=true: ')}")
            return Engine(bundle)
        with contextlib.suppress(UserError):  # a disk that cannot be written to: it is tried again the next time
            write_sealed(path, {"times_as_fast": [round(one, 3), round(several, 3)]})
    pays = min(one, several) > LEAST_GAIN
    rank_zero_print(
        f"The decode step is {'' if pays else 'not '}compiled: compiled it is {one:.2g} times as fast for one"
        f" prompt, {several:.2g} times for {rows}."
    )
    return Engine(bundle, compile=pays)


def _fingerprint(bundle: Model, rows: int) -> str:
    """Of all that the choice depends on."""
    model = asdict(bundle.net.config), str(bundle.net.compute_dtype)
    return fingerprint_of(*model, rows, torch.__version__, torch.get_num_threads(), cpu_model())[:32]


def _times_as_fast(bundle: Model, rows: int) -> float:
    """Time of an eager engine over that of a compiled one, in turns.

    Raises:
        UserError: the compiler does not work.
    """
    engines = (Engine(bundle), Engine(bundle, compile=True))
    prompts = random_prompts(engines[0], [1] * rows)
    seconds = [[_seconds(engine, prompts) for engine in engines] for _ in range(REPEATS + 1)][1:]  # the first compiles
    eager, compiled = (statistics.median(times) for times in zip(*seconds, strict=True))
    return eager / compiled


def _seconds(engine: Engine, prompts: Sequence[list[int]]) -> float:
    new_tokens = min(NEW_TOKENS, engine.net.config.rotary_reach - 1)
    begin = time.perf_counter()
    engine.generate(prompts, new_tokens, stop_ids=(), tools=False, max_batch=len(prompts))
    return time.perf_counter() - begin
