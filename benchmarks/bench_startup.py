"""How long a command takes to begin: --help, the answer to a wrong key, and the first step of the demo's training.

    python benchmarks/bench_startup.py [--repeats 2] [--experiment demo] [--against FOLDER] [KEY=VALUE …]

By the clock, and CPU seconds of the command and what it starts, which others on the machine disturb less. The first
step is of the stage base, run before: its data, tokens and compiled code are in their caches. It is there when the last
line of metrics.csv is written, after a validation of eight rows. --against: the same of another checkout, in turns.
KEY=VALUE: further settings of the training.
"""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import Seconds, parser_of, ratio, report, spreads

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure and report."""
    parser = parser_of(__doc__, repeats=2)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    checkouts = {"here": HERE, **({"against": given.against.resolve()} if given.against else {})}
    wrong = ["model.dpeth=3"]
    commands = {
        "--help": ["--help"],
        "a wrong key": ["train", f"experiment={given.experiment}", "stage=base", *wrong],
        "a wrong key of a pipeline": ["pipeline", f"experiment={given.experiment}", *wrong],
    }
    found: dict[str, dict[str, list[Seconds]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        train = ["train", f"experiment={given.experiment}", f"paths.runs={folder}/runs", "run=it", "resume=never"]
        train += ["evaluation.every_steps=0", "evaluation.num_rows=8", "evaluation.sample_tokens=1", "logger=[]"]
        train += given.keys
        first = [*train, "stage=base", "max_steps=1"]
        run([*train, "stage=tokenizer"], HERE)
        for root in checkouts.values():
            run(first, root)
        for turn in range(given.repeats):
            for name, root in [*checkouts.items()][:: 1 if turn % 2 else -1]:
                for what, command in commands.items():
                    found.setdefault(what, {}).setdefault(name, []).append(run(command, root))
                begun = time.time(), run(first, root)
                newest = max(Path(folder).glob("runs/it*/base/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
                with newest.open(encoding="utf-8", newline="") as file:
                    assert next(csv.DictReader(file))
                seconds = newest.stat().st_mtime - begun[0], begun[1][1]
                found.setdefault("first step", {}).setdefault(name, []).append(seconds)
    measured: dict[str, Any] = {f"{what}, seconds": spreads(times, 1) for what, times in found.items()}
    if given.against:
        measured["against / here"] = {what: ratio(times, "against", "here") for what, times in found.items()}
    report("startup", given.repeats, {"settings": {"experiment": given.experiment}, **measured})


def run(arguments: list[str], root: Path) -> Seconds:
    """Seconds of a command of a checkout: by the clock, and of all its processes."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "nanochat_pl.cli.main", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root / "src")}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (2 if "model.dpeth=3" in arguments else 0), done.stderr
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - begin, cpu


if __name__ == "__main__":
    main()
