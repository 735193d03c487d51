"""Peak memory of a training step, measured in a fresh process: what other benchmarks import.

What is measured. A child process builds the model with its first weights. From then on counts what the process holds
*above* that: gradients, optimizer state, activations, and whatever operations need for a while. So neither the weights
nor the libraries are in the metric; gradients and optimizer state are. The step is the project's: ``weighted_loss`` and
backward for each micro-batch, then ``MuonAdamW.step``; the optimizer's state is allocated before the first step. Two
steps are made: the second finds all that the first one left.

On a CPU the metric is the largest resident size (``VmHWM`` of /proc/self/status, set back after the model is built;
Linux only) less the resident size at that moment. glibc's malloc would keep freed blocks and serve later ones from the
gaps, so the child runs with ``MALLOC_MMAP_THRESHOLD_`` low: every block above 64 KiB is a mapping of its own, and goes
back to the system when it is freed. What is left is the peak of what was allocated and touched, plus some MB of code
that is loaded at its first use. On a GPU it is
``torch.cuda.max_memory_allocated``, without the allocator's reserve and the CUDA context.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from nanochat_pl.model.config import ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.model.roles import parameter_roles
from nanochat_pl.optim.config import OptimSettings, resolve_hyperparameters
from nanochat_pl.optim.muon_adamw import MuonAdamW
from nanochat_pl.optim.param_groups import build_optimizer

# Blocks above the threshold are mappings of their own; a fixed threshold also keeps glibc from raising it by itself.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


@dataclasses.dataclass(frozen=True)
class StepShape:
    """A training step. The big shape of the log by default: a plain implementation takes gigabytes for it.

    Attributes:
        rows: in memory at once (``device_batch_size``).
        micro_batches: of a step; from the second on the gradients of the first are there, too.
        loss_chunk_tokens, activation_checkpointing: as in ``trainer``.
    """

    depth: int = 4
    aspect_ratio: int = 64
    head_dim: int = 128
    sequence_len: int = 2048
    vocab_size: int = 32_768
    rows: int = 4
    micro_batches: int = 1
    compute_dtype: str = "float32"
    device: str = "cpu"
    loss_chunk_tokens: int | str | None = None
    activation_checkpointing: bool = False


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """Bytes: of the model's weights as counted, and the step's peak above what was held when the model was built."""

    weights: int
    peak: int


def peak_memory(shape: StepShape, num_threads: int | None = None) -> PeakMemory:
    """Measure a shape in a fresh process. Raises ``CalledProcessError`` where that fails (out of memory)."""
    environment = {**os.environ, **MALLOC}
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(dataclasses.asdict(shape))]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


class Stepper:
    """A model with its optimizer, on random tokens."""

    def __init__(self, shape: StepShape) -> None:
        settings = ModelSettings(
            depth=shape.depth,
            aspect_ratio=shape.aspect_ratio,
            head_dim=shape.head_dim,
            sequence_len=shape.sequence_len,
        )
        dtype: str = shape.compute_dtype
        config = resolve_model(settings, shape.vocab_size, dtype)
        self.shape = shape
        self.net = init_weights(GPT(config).materialise(shape.device))
        self.net.loss_chunk_tokens = shape.loss_chunk_tokens
        self.net.activation_checkpointing = shape.activation_checkpointing
        self.hyper = resolve_hyperparameters(OptimSettings(), width=config.width, compute_dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        size = (shape.rows, shape.sequence_len + 1)
        self.ids = torch.randint(shape.vocab_size, size, generator=generator).to(shape.device)
        self.optimizer: MuonAdamW | None = None

    def step(self) -> float:
        """One optimizer step; gives the mean loss in nats."""
        if self.optimizer is None:
            roles = parameter_roles(self.net)
            self.optimizer = build_optimizer(self.net.named_parameters(), roles, self.hyper)
            self.optimizer.allocate_state()
        inputs, targets = self.ids[:, :-1], self.ids[:, 1:]
        count = targets.numel() * self.shape.micro_batches
        total = torch.zeros((), device=inputs.device)
        for _ in range(self.shape.micro_batches):
            nats = self.net.weighted_loss(inputs, targets) / count
            nats.backward()
            total += nats.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()


def _measure(shape: StepShape) -> PeakMemory:
    stepper = Stepper(shape)
    on_gpu = torch.device(shape.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark falls to what is held now
        before = status("VmRSS")
    stepper.step()
    stepper.step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM")
    weights = sum(parameter.nbytes for parameter in stepper.net.parameters())
    return PeakMemory(weights=weights, peak=peak - before)


def status(name: str) -> int:
    """A size of this process in bytes, as the kernel counts it."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"the kernel does not say {name}"
    return 1024 * int(found[1])


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_measure(StepShape(**json.loads(sys.argv[1]))))))
