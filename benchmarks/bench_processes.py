"""Two processes against one, each with one thread: tokens a second, and the time spent waiting for each other.

Every round trains the same few steps with one process and with two, one after the other, so the machine's moods meet
both; the ratios are of a round. The first steps are left out.
"""

from __future__ import annotations

import csv
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _report import parser_of, report, spread

WARM_UP_STEPS = 2
MODEL = ("model.aspect_ratio=64", "model.head_dim=64", "model.sequence_len=256")
SETTINGS = (
    *("stage=base", "data=local", "data.txt_document_chars=1000", "tokenizer.vocab_size=4096"),
    *("evaluation.every_steps=0", "evaluation.num_rows=8", "evaluation.sample_tokens=1"),
    *("trainer.accelerator=cpu", "trainer.num_threads=1", "trainer.compile=false", "logger=[]"),
    *("trainer.checkpoint_every_steps=1000", "resume=never"),
)


def write_text(path: Path) -> None:
    """A few megabytes of made-up words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(5_000)]
    path.write_text("\n\n".join(" ".join(chance.choices(words, k=300)) for _ in range(1_500)), encoding="utf-8")


def train(processes: int, folder: Path, num_steps: int, sizes: tuple[str, ...]) -> tuple[float, float]:
    """Median seconds of a step, and the median share of them that was spent waiting for the other process."""
    runs = folder / f"runs{processes}"
    own = (f"data.path={folder / 'text.txt'}", f"paths.runs={runs}", f"paths.cache={folder / 'cache'}")
    steps = (f"max_steps={num_steps + WARM_UP_STEPS}", *sizes, "run=bench")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    launcher = [sys.executable, "-m"] if processes == 1 else torchrun
    command = [*launcher, "nanochat_pl.cli.main", "train", *SETTINGS, *MODEL, *own, *steps]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    newest = max(runs.glob("bench*/base/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[WARM_UP_STEPS:]
    seconds = [float(row["train/step_seconds"]) for row in rows]
    waited = [float(row["train/communication_seconds"] or 0) for row in rows]
    return statistics.median(seconds), statistics.median(w / s for w, s in zip(waited, seconds, strict=True))


def main() -> None:
    """Measure and report."""
    given = parser_of(__doc__, rounds=2, steps=4, device_batch_size=4, depth=4, step_tokens=2048).parse_args()
    sizes = (f"device_batch_size={given.device_batch_size}", f"model.depth={given.depth}")
    sizes += (f"total_batch_tokens={given.step_tokens}",)
    ratios, shares = [], []
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt")
        for number in range(given.rounds):
            order = (1, 2) if number % 2 == 0 else (2, 1)
            found = {processes: train(processes, folder, given.steps, sizes) for processes in order}
            ratios.append(found[1][0] / found[2][0])
            shares.append(found[2][1])
            for processes, (seconds, _) in found.items():
                rates[processes].append(given.step_tokens / seconds)
    measured = {
        "tokens a second, two processes over one": spread(ratios),
        "tokens a second": {f"{processes} processes": spread(values) for processes, values in rates.items()},
        "share of a step that a process waits for the other": spread(shares),
    }
    report("processes", given.rounds, measured)


if __name__ == "__main__":
    main()
