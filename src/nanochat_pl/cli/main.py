"""`nanochat-pl <command> key=value …`: finds the command, runs it, and says what went wrong in plain sentences."""

from __future__ import annotations

import contextlib
import importlib
import io
import keyword
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from nanochat_pl.cli._subprocess import follows_stdin, note_exit
from nanochat_pl.common.console import ignore_broken_pipe, replace_unencodable_characters
from nanochat_pl.common.constants import EXIT_USER_ERROR
from nanochat_pl.common.errors import LostContact, SharedError, UserError, did_you_mean, first_line
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.common.wait_policy import wait_policy

# Each command is a file of this folder with a function run(overrides) -> exit code, and Config.
COMMANDS = {
    "train": "one stage of a run: train stage=tokenizer|base|mid|sft|rl",
    "pipeline": "the stages that an experiment names, one after the other: pipeline experiment=demo",
    "search": "settings with the best metric, with Optuna: search 'optim.matrix_lr=interval(0.01,0.1)' run=lr",
    "download": "files of a data set, verified: download data=climbmix num_shards=8",
    "tokenize": "a part of a stage's text ahead, for several machines: tokenize data=climbmix run=NAME shards=0/8",
    "doctor": "what the data of a stage will do, before it is trained on: doctor stage=base|mid|sft",
    "plan": "the settings that follow from model.depth, each with its reason, without training",
    "evaluate": "metrics of a trained stage: run=NAME suites=[bpb,core,chat,chatcore,harness,samples,tokenizer]",
    "chat": 'talk to a model: chat run=NAME, or one answer: chat run=NAME prompt="…"',
    "serve": "a page to talk on, and an API that clients of OpenAI's speak: serve run=NAME",
    "bench": "how fast a model generates here, beside what the machine could: bench run=NAME",
    "import": "a bundle of a model from elsewhere: import source=PATH to=PATH",
    "export": "a trained stage for other programs: export run=NAME to=PATH",
    "inspect": "an answer that stage rl learnt from, written again: inspect run=NAME rollout=STEP:I",
    "report": "tables and plots of a run: report run=NAME",
    "compare": "what differs between runs, beyond the noise of their seeds: compare 'A*' 'B*'",
    "scaling": "the best size for a budget, or a power law, of a ladder of runs: scaling 'A*'",
    "selftest": "proves this machine in a minute: arithmetic, collectives, resume files; also under torchrun",
    "runs": "what has been trained: runs stage=base sort=val/bpb; runs delete=NAME",
}

# Several values for a key, one job for each (-m): these commands can be swept.
SWEPT = ("train", "pipeline")
_SWEEP = ("-m", "--multirun")
_ASKS = ("--help", "-h", "--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
# Commands that several processes do together, as torchrun starts them.
TOGETHER = ("train", "evaluate", "selftest")
# Which of these is set, it is a launcher that has started the processes.
_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}
# What a launcher has to end this process, after another one has failed.
_SECONDS_FOR_LAUNCHER = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The console command. Gives the exit code: 0 done, 2 a mistake that the person can put right, 1 a bug of ours."""
    os.environ.update(wait_policy(os.environ))
    _let_gpu_memory_grow()
    replace_unencodable_characters(sys.stdout, sys.stderr)
    if follows_stdin():
        _stop_with_parent()
    is_program = arguments is None
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        if launch_env().world_size == 1:
            return _dispatch(arguments)
        return note_exit(_dispatch_together(arguments) if _is_together(arguments) else _dispatch_alone(arguments))
    except (Exception, KeyboardInterrupt) as error:
        if is_program:
            _end_at_next_interrupt()
        return note_exit(_report(error))
    finally:
        if is_program:
            _end_at_next_interrupt()


def _end_at_next_interrupt() -> None:
    """Only the end is left: a Ctrl-C has nothing to stop any more, and its traceback would say nothing."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:  # it had come before: the error that ends the command is what there is to say
        _end_at_next_interrupt()


def _let_gpu_memory_grow() -> None:
    """Let PyTorch's blocks of GPU memory grow, so that less is lost between tensors. Read when torch is loaded."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform.startswith("linux") and not any(name in os.environ for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@ignore_broken_pipe()
def _report(error: BaseException) -> int:
    """Say what went wrong, on stderr; gives the exit code."""
    if isinstance(error, UserError):
        _print_problems(error)
        return EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        print("\nStopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `… | head`
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    if isinstance(error, LostContact):
        print(f"error: another process has ended: {error}.", file=sys.stderr)
        print("It or its launcher says why. The same command goes on from the last resume file.", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    print("\nThis is a bug in nanochat_pl: please report it with the lines above.", file=sys.stderr)
    return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        _print_commands()
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"nanochat-pl {version('nanochat-pl')}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UserError(
            f"{command!r}: there is no such command; {did_you_mean(command, COMMANDS)}",
            "nanochat-pl lists the commands.",
        )
    if any(argument in ("--help", "-h") for argument in rest):
        from nanochat_pl.cli.help import print_help

        print_help(command, [argument for argument in rest if not argument.startswith("-")])
        return 0
    from nanochat_pl.cli._warnings import quieten

    quieten()
    if _is_plain(rest):
        return int(_module(module_of(command)).run(rest))
    return _dispatch_to_hydra(command, rest)


def _is_plain(arguments: Sequence[str]) -> bool:
    """Whether a command line has nothing of Hydra's own: no options, no keys ``hydra.…``."""
    return not any(re.match(r"-|\+*hydra[./]", argument) for argument in arguments)


def _dispatch_to_hydra(command: str, arguments: Sequence[str]) -> int:
    """A command line as any program of Hydra has it: ``-m``, ``--cfg job``, ``--config-dir``, ``hydra.run.dir=…``."""
    from nanochat_pl.config import config_dir, hydra_app

    options = hydra_app.parse(arguments)
    with config_dir.chosen(options.config_dir, options.config_name):
        if options.cfg == "job":
            from nanochat_pl.cli.help import print_config

            print_config(command, options)
            return 0
        if options.multirun:
            if command not in SWEPT:
                raise UserError(f"-m: several jobs are for {' and '.join(SWEPT)}, not for {command}.")
            return int(_module("nanochat_pl.cli._sweep").run_sweep(command, options))
        if options.config_name is not None and command not in (*config_dir.LIKE_TRAIN, *SWEPT):
            raise UserError(f"--config-name: is for {', '.join(config_dir.LIKE_TRAIN)}, not for {command}.")
        module = _module(module_of(command))
        if options.prints_only:
            hydra_app.show(command, module.Config, options)
            return 0
        if len(options.own_overrides) == len(options.overrides):
            return int(module.run(options.own_overrides))
        if command not in SWEPT and command not in config_dir.LIKE_TRAIN:
            raise UserError(
                f"hydra.…: is for {', '.join(dict.fromkeys((*config_dir.LIKE_TRAIN, *SWEPT)))}, not for {command}."
            )
        from nanochat_pl.cli.help import check_command

        check_command(command, options.own_overrides)  # before Hydra makes a folder for it
        return hydra_app.run(command, module.Config, options, lambda: int(module.run(options.own_overrides)))


def _module(name: str) -> ModuleType:
    with loading_libraries():
        return importlib.import_module(name)


@ignore_broken_pipe()
def _dispatch_together(arguments: list[str]) -> int:
    """One of several processes that a launcher has started with the same command."""
    from nanochat_pl.distributed import coordination

    coordination.begin()
    try:
        try:
            code = _dispatch(arguments)
        except SharedError as error:
            if launch_env().rank == 0:
                _print_problems(error)
            code = EXIT_USER_ERROR
        coordination.end()
    except (Exception, KeyboardInterrupt) as error:
        _end_alone(error)
    return code


def _end_alone(error: BaseException) -> NoReturn:
    """End this process at once with an error that the others have not raised; then the launcher ends those.

    What each finds for itself, as a wrong key, the first one prints.
    """
    code = 1
    try:
        # After a signal, whoever has sent it, a launcher or a person, knows more.
        signum = error.signum if isinstance(error, LostContact) else None
        code = 128 + signum if signum else _report_alone(error)
        sys.stdout.flush()
    finally:
        os._exit(code)  # nothing waits for the others


def _report_alone(error: BaseException) -> int:
    """As :func:`_report`, with the number of this process."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from nanochat_pl.distributed import collectives

    if isinstance(error, LostContact):  # the cause is the other's to say, and its exit code the one that counts
        time.sleep(_SECONDS_FOR_LAUNCHER)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = _report(error)
    if not isinstance(error, LostContact):
        note_exit(code)
        if not isinstance(error, UserError):
            get_error_handler().record_exception(error)  # for torchrun's table
    if collectives.is_first_to_say(first_line(error)):
        lines = printed.getvalue().splitlines(keepends=True)
        told = [f"process {launch_env().rank}: {line}" if line.strip() else line for line in lines]
        os.write(2, "".join(told).encode("utf-8", errors="replace"))  # in one piece: the others write, too
    return code


def _is_together(arguments: list[str]) -> bool:
    """Whether it is something that processes do together: whatever else is asked of several, one answers."""
    sweeps = _has_option(arguments, _SWEEP) or "hydra.mode=MULTIRUN" in arguments
    return bool(arguments) and arguments[0] in TOGETHER and not _prints_only(arguments) and not sweeps


def _prints_only(arguments: list[str]) -> bool:
    """Whether something is printed and nothing done."""
    return _has_option(arguments, _ASKS)


def _has_option(arguments: Sequence[str], options: Sequence[str]) -> bool:
    return any(argument.split("=")[0] in options for argument in arguments)


def _dispatch_alone(arguments: list[str]) -> int:
    """What is not done together, under a launcher: nobody waits for anybody."""
    place = launch_env()
    if place.rank > 0 and _LAUNCHERS & {*os.environ}:
        return 0  # the first speaks; without a launcher there may be no first, but variables of a machine
    if arguments and arguments[0] in COMMANDS and not _prints_only(arguments):
        raise UserError(
            f"nanochat-pl {' '.join(arguments[:2])} …: was started {place.world_size} times at once.",
            f"Several processes do together: {', '.join(TOGETHER)}, as in torchrun … -m nanochat_pl.cli.main train …;"
            " all else, pipelines and sweeps too, runs as one process. Where no launcher started it,"
            f" WORLD_SIZE={place.world_size} has been left in the environment: unset it.",
        )
    return _dispatch(arguments)


def module_of(command: str) -> str:
    """The module of a command. One that is a word of the language, as import, has an underscore behind it."""
    return f"nanochat_pl.cli.{command}{'_' if keyword.iskeyword(command) else ''}"


def _print_commands() -> None:
    print("nanochat-pl <command> key=value …\n")
    for command, what in COMMANDS.items():
        print(f"  {command:<10}{what}")
    print("\nnanochat-pl <command> --help shows its keys. The first thing to try: nanochat-pl pipeline experiment=demo")


def _print_problems(error: UserError) -> None:
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    if error.fix:
        print(error.fix, file=sys.stderr)


def _stop_with_parent() -> None:
    """Ask this process to stop when its parent is gone, even where that was killed with no chance to say so."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
