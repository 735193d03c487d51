"""What one GPU does with this project in less than eight minutes: no network, no data, no other package.

    python benchmarks/gpu/bench_gpu.py [--json bench_gpu.json] [--minutes 8] [--toy]

Each part runs in a process of its own, so one that fails, hangs or breaks the device leaves the others alone; what was
not measured says why. Times are medians of n repeats, each after the device has finished, the first ones not counted.
The last line is JSON, which `nanochat-pl plan bench=FILE` reads: the measured MFU takes the place of the assumed one.
Weights are the first ones and tokens are random: neither has a say in the time. ``--toy``: tiny sizes, on any device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.common.device import choose_compute_dtype, device_name
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.common.out_of_memory import is_out_of_memory, release_memory
from nanochat_pl.engine import Engine
from nanochat_pl.engine.bench import as_plain, measure_batch, measure_limits
from nanochat_pl.engine.settings import BenchSettings
from nanochat_pl.model.attention import windowed_attention
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.counts import flops_per_token
from nanochat_pl.model.fp8 import fp8_linear, why_no_fp8
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.param_groups import build_optimizer
from nanochat_pl.planning.gpus import peak_flops
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

VERSION = 1
MINUTES, PART_SECONDS, MIN_SECONDS = 8.0, 150.0, 20.0
REPEATS = 7


class Size(NamedTuple):
    """Of all parts."""

    depth: int
    large_depth: int
    head_dim: int
    sequence_len: int
    vocab_size: int
    rows: int  # at once to begin with: halved where memory runs out
    step_tokens: int
    compiled: bool
    decode: BenchSettings


FULL = Size(12, 24, 128, 2048, 32768, 32, 2**19, True, BenchSettings((1, 32), 64, 128, 3))
TOY = Size(2, 2, 32, 64, 512, 2, 256, False, BenchSettings((1, 2), 8, 4, 1))


def device_part(size: Size, device: torch.device) -> dict[str, Any]:
    """Copies and matrix products: what the device reaches of its data sheet."""
    side = 8192 if size is FULL else 64
    dtype = TORCH_DTYPES[choose_compute_dtype("auto", device)]
    square = torch.ones(side, side, dtype=dtype, device=device)
    source = torch.empty(side * side * 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {"product_dtype": str(dtype).removeprefix("torch.")}
    found["product_flops"] = 2 * side**3 / seconds_of(lambda: square @ square, device)["median"]
    found["copy_bytes_per_second"] = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)["median"]
    reason = why_no_fp8(device, dtype, 16)
    found["fp8_product_flops"] = {"unmeasured": reason} if reason else attempt(lambda: _fp8_flops(side, device))
    return found


def _fp8_flops(side: int, device: torch.device) -> float:
    a = torch.ones(side, side, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def work() -> Tensor:
        return torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * side**3 / seconds_of(work, device)["median"]


def linear_part(size: Size, device: torch.device) -> dict[str, Any]:
    """A large linear map, forward and backward, in bfloat16 and in FP8 with its scaling, compiled: milliseconds."""
    rows, inputs, outputs = (65536, 1664, 6656) if size is FULL else (64, 128, 128)
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(outputs, inputs, device=device, requires_grad=True)
    given = torch.randn(rows, outputs, device=device, dtype=torch.bfloat16)
    ways = {
        "bfloat16": lambda x, weight: F.linear(x, weight.to(x.dtype)),
        "fp8": lambda x, weight: fp8_linear(x, weight, "scaled_mm"),
    }

    def measured(function: Callable[..., Tensor]) -> dict[str, Any]:
        run = torch.compile(function, dynamic=False) if size.compiled else function
        return milliseconds_of(lambda: torch.autograd.grad(run(x, weight), (x, weight), given), device)

    return {name: attempt(lambda function=function: measured(function)) for name, function in ways.items()}


def attention_part(size: Size, device: torch.device) -> dict[str, Any]:
    """Attention of rows, forward and backward, by backend and window: milliseconds."""
    heads, length = 6, size.sequence_len
    dtype = TORCH_DTYPES[choose_compute_dtype("auto", device)]
    q, k, v = (
        torch.randn(size.rows, heads, length, size.head_dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    given, scale = torch.randn_like(q), size.head_dim**-0.5
    found: dict[str, Any] = {"rows": size.rows, "heads": heads, "length": length, "head_dim": size.head_dim}
    for window in (length - 1, length // 4):
        backends = {
            "chosen": lambda window=window: windowed_attention(q, k, v, window, scale),
            "varlen": lambda window=window: _varlen(q, k, v, window, scale),
            "flex": _flex(q, k, v, window, scale, size.compiled),
        }
        if window == length - 1:
            backends["sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        for name, function in backends.items():
            found[f"{name}, window {window}"] = attempt(
                lambda function=function: milliseconds_of(
                    lambda: torch.autograd.grad(function(), (q, k, v), given), device
                )
            )
    return found


def _varlen(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = q.shape
    ends = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y: Any = varlen_attn(q, k, v, ends, ends, length, length, scale=scale, window_size=(window, 0))
    return y.unflatten(0, (rows, length)).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, compiled: bool) -> Callable[[], Tensor]:
    made: list[Any] = []

    def work() -> Tensor:
        if not compiled:
            raise RuntimeError("eager, it makes the full matrix of scores")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:

            def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key <= query) & (key >= query - window)

            length = q.size(2)
            mask = create_block_mask(sees, None, None, length, length, device=q.device.type)
            made.extend((torch.compile(flex_attention, dynamic=False), mask))
        return made[0](q, k, v, block_mask=made[1], scale=scale)

    return work


def step_part(size: Size, device: torch.device, depth: int, fp8: bool) -> dict[str, Any]:
    """Training steps: tokens a second, MFU, memory. FP8 is held against the bfloat16 peak, too."""
    dtype = choose_compute_dtype("auto", device)
    reason = why_no_fp8(device, TORCH_DTYPES[dtype], size.sequence_len) if fp8 else None
    if reason is not None:
        return {"unmeasured": reason}
    rows = size.rows
    while True:
        try:
            return _steps(size, device, depth, fp8, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        rows //= 2
        release_memory(device)


def _steps(size: Size, device: torch.device, depth: int, fp8: bool, rows: int) -> dict[str, Any]:
    dtype = choose_compute_dtype("auto", device)
    settings = ModelSettings(depth=depth, head_dim=size.head_dim, sequence_len=size.sequence_len)
    config = resolve_model(settings, size.vocab_size, dtype)
    net = init_weights(GPT(config).materialise(device), seed=0)
    if fp8:
        net.enable_fp8("scaled_mm")
    loss = CompiledLoss(net) if size.compiled else net.loss_by_row
    hyper = resolve_hyperparameters(OptimSettings(), width=config.width, compute_dtype=dtype)
    optimizer = build_optimizer(net.named_parameters(), parameter_roles(net), hyper)
    optimizer.allocate_state()
    ids = torch.randint(size.vocab_size, (rows, size.sequence_len + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def micro() -> None:
        (loss(inputs, targets)[0] / targets.numel()).backward()

    def update() -> None:
        optimizer.reduce_gradients()
        optimizer.step()

    began = time.perf_counter()
    micro()
    update()
    synchronize(device)
    first = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    of_micro, of_update = seconds_of(micro, device), []
    for _ in range(3):
        micro()
        synchronize(device)
        began = time.perf_counter()
        update()
        synchronize(device)
        of_update.append(time.perf_counter() - began)
        optimizer.zero_grad()
    tokens = inputs.numel()
    micro_batches = max(1, size.step_tokens // tokens)
    seconds = micro_batches * of_micro["median"] + statistics.median(of_update)
    rate = micro_batches * tokens / seconds
    peak = peak_flops(device_name(device), dtype)
    return {
        "depth": depth,
        "fp8": fp8,
        "compute_dtype": dtype,
        "device_batch_size": rows,
        "tokens_of_a_step": micro_batches * tokens,
        "tokens_per_second": rate,
        "mfu": flops_per_token(config) * rate / peak if peak else {"unmeasured": "the peak of the device is not known"},
        "micro_batch_seconds": of_micro,
        "update_seconds": spread(of_update),
        "first_step_seconds": first,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else {"unmeasured": "only of GPUs of NVIDIA"},
    }


class Bundle(NamedTuple):
    """What the engine reads of one."""

    net: GPT
    tokenizer: Tokenizer


def decode_part(size: Size, device: torch.device) -> dict[str, Any]:
    """Answers of the engine, by how many are written at once."""
    dtype = choose_compute_dtype("auto", device)
    settings = ModelSettings(depth=size.depth, head_dim=size.head_dim, sequence_len=size.sequence_len)
    net = init_weights(GPT(resolve_model(settings, size.vocab_size, dtype)).materialise(device), seed=0).eval()
    tokens = [bytes([i]) for i in range(256)] + [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    ranks = {token: i for i, token in enumerate(tokens[: size.vocab_size - len(SPECIAL_TOKENS)])}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    bundle = Bundle(net, Tokenizer.from_ranks(ranks, SPLIT_PATTERN, specials))
    eager = Engine(bundle)
    limits = measure_limits(eager)

    def of_sizes(engine: Engine) -> dict[str, Any]:
        return {
            f"{rows} rows": attempt(lambda rows=rows: as_plain(measure_batch(engine, size.decode, rows, limits)))
            for rows in size.decode.batch_sizes
        }

    def with_graphs() -> dict[str, Any]:
        if device.type != "cuda":
            return {"unmeasured": "CUDA graphs are for GPUs of NVIDIA"}
        engine, prompts = Engine(bundle, compile=True), [[1, 2, 3], [4], [5] * 20]
        ours, theirs = (each.generate(prompts, 16, stop_ids=(), tools=False) for each in (engine, eager))
        # The first token follows from the prompt, which is read the same way; the second is the first of a graph.
        far = max(abs(x.logprobs[1] - y.logprobs[1]) for x, y in zip(ours, theirs, strict=True) if x.ids[0] == y.ids[0])
        return {"largest_difference_of_a_second_logprob": far, **of_sizes(engine)}

    return {"depth": size.depth, "limits": as_plain(limits), **of_sizes(eager), "graphs": attempt(with_graphs)}


PARTS: dict[str, Callable[[Size, torch.device], dict[str, Any]]] = {
    "device": device_part,
    "train_bfloat16": lambda size, device: step_part(size, device, size.depth, fp8=False),
    "train_fp8": lambda size, device: step_part(size, device, size.depth, fp8=True),
    "decode": decode_part,
    "attention": attention_part,
    "linear": linear_part,
    "train_large_bfloat16": lambda size, device: step_part(size, device, size.large_depth, fp8=False),
    "train_large_fp8": lambda size, device: step_part(size, device, size.large_depth, fp8=True),
}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Of one call, after two that are not counted."""
    seconds = []
    for _ in range(REPEATS + 2):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return spread(seconds[2:])


def milliseconds_of(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """As :func:`seconds_of`."""
    return {key: value if key == "n" else 1e3 * value for key, value in seconds_of(work, device).items()}


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least and most of n."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


def attempt(work: Callable[[], Any]) -> Any:
    """What some work gives, or why it gives nothing: a part goes on without it."""
    try:
        return work()
    except Exception as error:
        text = " ".join(error.problems) if isinstance(error, UserError) else first_line(error)
        return {"unmeasured": f"{type(error).__name__}: {text}"[:300]}


def run_part(name: str, toy: bool) -> dict[str, Any]:
    """One part, in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    if toy:
        torch.set_num_threads(1)  # what is tried is the program, beside other work maybe
    began = time.perf_counter()
    found = attempt(lambda: PARTS[name](TOY if toy else FULL, device))
    return {**found, "seconds": time.perf_counter() - began}


def in_a_process(name: str, toy: bool, seconds: float) -> dict[str, Any]:
    """One part, in a process that is ended after so many seconds."""
    command = [sys.executable, __file__, "--part", name, *(["--toy"] if toy else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"unmeasured": f"not done after {seconds:.0f} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {"unmeasured": f"ended with {done.returncode}: {said[-1][:300] if said else 'nothing was said'}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def facts() -> dict[str, Any]:
    """What was measured on."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    return {
        "device": device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main() -> None:
    """Measure all parts, as far as the time reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(run_part(given.part, given.toy)))
        return
    began, parts = time.perf_counter(), {}
    about = facts()
    print(f"{about['device']}, PyTorch {about['torch']}")
    if not torch.cuda.is_available() and not given.toy:
        print("there is no GPU: nothing is measured (--toy tries the program out)")
    for name in PARTS:
        left = 60 * given.minutes - (time.perf_counter() - began)
        if not torch.cuda.is_available() and not given.toy:
            parts[name] = {"unmeasured": "PyTorch sees no GPU"}
        elif left < MIN_SECONDS:
            parts[name] = {"unmeasured": "no time was left"}
        else:
            parts[name] = in_a_process(name, given.toy, min(PART_SECONDS, left))
        print(f"{name}: {json.dumps(parts[name])}", flush=True)
    head = {"benchmark": "gpu", "machine": f"{about['device']}, PyTorch {about['torch']}", "n": REPEATS}
    whole = {
        **head,
        "version": VERSION,
        "toy": given.toy,
        **about,
        "seconds": time.perf_counter() - began,
        "parts": parts,
    }
    text = json.dumps(whole)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
