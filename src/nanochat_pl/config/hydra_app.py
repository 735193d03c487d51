"""What any program of Hydra does on its command line: its options, its own keys ``hydra.…``, several jobs with ``-m``.

One job that has none of these does not come here: :mod:`~nanochat_pl.config.compose` composes it with the same files.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from nanochat_pl.common.errors import UserError
from nanochat_pl.config import config_dir
from nanochat_pl.config.compose import groups_of
from nanochat_pl.config.overrides import is_hydras, is_objects, is_text, split_override, take_key, type_of_key
from nanochat_pl.config.stage_choice import name_of_stage
from nanochat_pl.training.stages.registry import all_stages

MAX_JOBS = 1_000
# A pipeline is composed as its stages are.
_ROOTS = {"pipeline": "train"}
_MEANS_SWEEP = "hydra.mode=MULTIRUN"
# Hydra's option that is not needed here, and what does the same.
_REFUSED = {"config_path": "--config-path", "experimental_rerun": "--experimental-rerun"}


@dataclass(frozen=True)
class HydraOptions:
    """The options of a command line, as :func:`parse` finds them.

    Attributes:
        overrides: all else, in order.
        cfg, package, resolve: print a configuration.
        multirun: several jobs.
        info, hydra_help, shell_completion: tell something.
        config_dir, config_name: further files.
    """

    overrides: tuple[str, ...]
    cfg: str | None = None
    package: str | None = None
    resolve: bool = False
    multirun: bool = False
    info: str | None = None
    hydra_help: bool = False
    shell_completion: bool = False
    config_dir: str | None = None
    config_name: str | None = None

    @property
    def asks(self) -> bool:
        """Whether something is printed and nothing done."""
        return bool(self.cfg or self.info or self.hydra_help or self.shell_completion)

    @property
    def own(self) -> tuple[str, ...]:
        """The overrides that are not Hydra's own."""
        return tuple(text for text in self.overrides if not is_hydras(text.lstrip("+~").partition("=")[0]))


def parse(arguments: Sequence[str]) -> HydraOptions:
    """Part a command line into Hydra's options and overrides.

    Raises:
        UserError: an option without its value, with a wrong one, or one that has no place here.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        found, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0]
        raise UserError(f"{name}: {error.message}.", "The options are those of Hydra: --hydra-help.") from error
    for name, option in _REFUSED.items():
        if getattr(found, name) is not None:
            raise UserError(f"{option}: has no place here.", "A folder of files of your own: --config-dir DIR.")
    asked = {
        "--cfg": found.cfg,
        "--info": found.info,
        "--hydra-help": found.hydra_help,
        "--shell-completion": found.shell_completion,
        "--multirun": found.multirun,
    }
    if len(several := [option for option, value in asked.items() if value]) > 1:
        raise UserError(f"{' and '.join(several)}: only one of them at a time.")
    for option in ("resolve", "package"):
        if getattr(found, option) and not found.cfg:
            raise UserError(f"--{option}: says how --cfg prints, and there is no --cfg.")
    # What argparse does not know keeps its place for the messages: -x, and values that begin with a dash.
    rest = [text for text in arguments if text in {*found.overrides, *unknown}]
    return HydraOptions(
        overrides=tuple(text for text in rest if text != _MEANS_SWEEP),
        multirun=found.multirun or _MEANS_SWEEP in rest,
        **{
            name: getattr(found, name)
            for name in ("cfg", "package", "resolve", "info", "hydra_help", "shell_completion")
        },
        config_dir=found.config_dir,
        config_name=found.config_name,
    )


def show(command: str, schema: type, options: HydraOptions) -> None:
    """Print what Hydra itself knows: ``--info``, ``--hydra-help``, ``--cfg hydra``, ``--shell-completion``."""
    root = config_dir.root_file(_ROOTS.get(command, command))
    texts = _for_hydra(options.overrides, schema)
    with _explained(), config_dir.hydra(_experiment_path(options.overrides)) as hydra:
        if options.shell_completion:
            hydra.shell_completion(root, list(options.overrides))
        elif options.hydra_help:
            own_keys = [text for text in texts if text not in options.own and is_hydras(text.lstrip("+~"))]
            hydra.hydra_help(root, get_args_parser(), argparse.Namespace(overrides=own_keys, resolve=False))
        elif options.info:
            before = logging.root.handlers[:], logging.root.level
            try:
                hydra.show_info(options.info, root, texts)
            finally:  # it prints through the log
                logging.root.handlers[:], logging.root.level = before
        else:
            hydra.show_cfg(root, texts, options.cfg or "all", options.package, options.resolve)


def run(command: str, schema: type, options: HydraOptions, job: Callable[[], int]) -> int:
    """Do one job within Hydra: its output folder, logging, environment and callbacks are those of ``hydra.…``.

    Returns:
        the exit code that the job gives.
    """
    root = config_dir.root_file(_ROOTS.get(command, command))
    texts = _for_hydra(options.overrides, schema)
    codes: list[int] = []
    raised: list[BaseException] = []

    def task(config: Any) -> None:
        try:
            codes.append(job())
        except BaseException as error:  # Hydra has words of its own for it
            raised.append(error)

    with config_dir.hydra(_experiment_path(options.overrides)) as hydra, _explained():
        hydra.run(root, task, texts)
    if raised:
        raise raised[0]
    return codes[0]


def sweep(
    command: str,
    schema: type,
    options: HydraOptions,
    plan: Callable[[list[list[str]] | None, list[str]], Callable[[Any], float]],
) -> None:
    """Run several jobs with the chosen sweeper and launcher.

    Args:
        plan: given the overrides of each job, or None where the sweeper finds them as it goes on, and the keys that are
            swept over, gives the function that does one job. It must be one that can be pickled: a launcher may call
            it in another process.

    Raises:
        UserError: what Hydra says of the overrides.
    """
    root = config_dir.root_file(_ROOTS.get(command, command))
    texts = _for_hydra(options.overrides, schema)
    with config_dir.hydra(_experiment_path(options.overrides)) as hydra:
        with _explained():
            config = hydra.compose_config(root, texts, RunMode.MULTIRUN)
            parser = OverridesParser.create(config_loader=hydra.config_loader)
            tasks = [text for text in texts if not is_hydras(text.lstrip("+").partition("=")[0])]
            parsed = parser.parse_overrides(tasks)
            swept = [_key(override) for override in parsed if override.is_sweep_override()]
            _require_countable(parsed)
            # Of another sweeper only it knows the jobs.
            is_grid = config.hydra.sweeper["_target_"].endswith(".BasicSweeper")
            params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
            every = parser.parse_overrides([*params, *tasks])
            swept += [_key(override) for override in every[: len(params)]]
            jobs = BasicSweeper.split_arguments(every, None)[0] if is_grid else None
        if jobs is not None and not jobs:
            raise UserError("-m: makes no job at all.", "Look at the values that are swept over.")
        function = plan(jobs, swept)
        with _explained():
            hydra.multirun(root, function, texts)


def current_job() -> tuple[int, list[str]]:
    """Number of the job that a launcher is doing, from 1, and its overrides."""
    hydra = HydraConfig.get()
    return int(hydra.job.num) + 1, list(hydra.overrides.task)


def _require_countable(overrides: Sequence[Override]) -> None:
    """Refuse more jobs than anybody means, before there is a list of them."""
    count = 1
    for override in overrides:
        if override.is_discrete_sweep():
            count *= sum(1 for _ in itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1))
        if count > MAX_JOBS:
            raise UserError(f"-m: {str(override.input_line).lstrip('+')}: makes more than {MAX_JOBS:,} jobs.")


def own_texts(texts: Sequence[str], schema: type, typed: Sequence[str]) -> list[str]:
    """The overrides of a job as a command of ours takes them.

    Args:
        texts: as Hydra gives them. Text of theirs loses the quotes of Hydra's grammar: ours has none.
        typed: what the user typed: an experiment that is named by its path has only its name in Hydra.
    """
    found = []
    for text in texts:
        key, raw, problem = split_override(text)
        own = key.split(".", 2)[2] if key.startswith("stages.") and key.count(".") >= 2 else key
        if key.startswith("~"):  # Hydra's sweeper puts a null behind it
            found.append(key)
        elif problem:
            found.append(text)
        elif key == "experiment":
            found.append(f"experiment={_experiment_path(typed) or raw}")
        elif key == "stage.name":  # of a stage without a file: a job knows it by its class alone
            found = [*(each for each in found if not each.startswith("stage=")), f"stage={raw}"]
        elif is_text(type_of_key(schema, own)):
            value = OverridesParser.create().parse_override(f"{key}={raw}").value()
            found.append(f"{key}={'null' if value is None else value}")
        else:
            found.append(f"{key}={raw}")
    return found


def _for_hydra(texts: Sequence[str], schema: type) -> list[str]:
    """The overrides with ``++`` where they set a value: every key is known to the settings, if not to the files."""
    groups = {*groups_of(schema), "experiment"}
    found = []
    for text in texts:
        key, raw, problem = split_override(text)
        if key.startswith("~") and is_objects(type_of_key(schema, key[1:])):
            found.append(f"{key[1:]}=[]")
        elif problem or is_hydras(key) or key.startswith("~"):
            found.append(text)
        elif key == "experiment" and raw.endswith((".yaml", ".yml")):
            found.append(f"experiment={config_dir.experiment_file(raw).stem}")
        elif key == "stage" and raw not in config_dir.groups()["stage"] and name_of_stage(raw) in all_stages():
            file = all_stages()[name_of_stage(raw)].config_file
            found += [f"stage={file}", f"++stage.name={raw}", "++stage.parent=null"]  # own_texts turns it back
        else:
            found.append(f"{key}={raw}" if key in groups and not raw.startswith("{") else f"++{key}={raw}")
    return found


def _experiment_path(texts: Sequence[str]) -> str:
    """The experiment that is named by its path."""
    name = take_key(texts, "experiment")[0]
    return name if name.endswith((".yaml", ".yml")) else ""


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+")


class _explained:
    """What Hydra and its plugins refuse, in one line; they have many ways to say it."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, _THEIRS):
            said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]).replace("++", "")
            fix = "Put quotes around a value with signs of its own: 'KEY=\"VALUE\"'." if "Lexer" in said else ""
            raise UserError(f"Hydra: {said or type(error).__name__}", fix) from error


_THEIRS = (
    HydraException,
    OmegaConfBaseException,
    OSError,
    ImportError,
    ValueError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
