"""Hydra's own command line: its options, its keys ``hydra.…``, and several jobs with ``-m``.

One job that has none of these does not come here: :mod:`~nanochat_pl.config.compose` composes it with the same files.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from nanochat_pl.common.console import ignore_broken_pipe
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.config import config_dir
from nanochat_pl.config.compose import groups_of
from nanochat_pl.config.experiment import overlay_of
from nanochat_pl.config.overrides import is_hydra_key, is_object_group, is_text, split_override, take_key, type_of_key
from nanochat_pl.config.stage_choice import name_of_stage
from nanochat_pl.training.stages.registry import all_stages

MAX_JOBS = 1_000
_MULTIRUN_KEY = "hydra.mode=MULTIRUN"
_QUOTES = "Put quotes around a value with special characters: 'KEY=\"VALUE\"'."
# Options of Hydra that are not needed here.
_REFUSED = {"config_path": "--config-path", "experimental_rerun": "--experimental-rerun"}


@dataclass(frozen=True)
class HydraOptions:
    """The options of a command line, as :func:`parse` finds them.

    Attributes:
        overrides: all else, in order.
        cfg, package, resolve: print a configuration.
        multirun: several jobs.
        info, hydra_help, shell_completion: print information.
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
    def prints_only(self) -> bool:
        """Whether something is printed and nothing done."""
        return bool(self.cfg or self.info or self.hydra_help or self.shell_completion)

    @property
    def own_overrides(self) -> tuple[str, ...]:
        """The overrides that are not Hydra's own."""
        return tuple(text for text in self.overrides if not is_hydra_key(text))


def parse(arguments: Sequence[str]) -> HydraOptions:
    """Split a command line into Hydra's options and overrides.

    Raises:
        UserError: an option without its value, with a wrong one, or one that is not supported.
    """
    parser = get_args_parser()
    parser.exit_on_error, parser.allow_abbrev = False, False
    try:
        found, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0]
        raise UserError(f"{name}: {error.message}.", "The options are those of Hydra: --hydra-help.") from error
    for name, option in _REFUSED.items():
        if getattr(found, name) is not None:
            raise UserError(f"{option}: is not supported.", "A folder of files of your own: --config-dir DIR.")
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
        overrides=tuple(text for text in rest if text != _MULTIRUN_KEY),
        multirun=found.multirun or _MULTIRUN_KEY in rest,
        **{
            name: getattr(found, name)
            for name in ("cfg", "package", "resolve", "info", "hydra_help", "shell_completion")
        },
        config_dir=found.config_dir,
        config_name=found.config_name,
    )


@ignore_broken_pipe()
def show(command: str, schema: type, options: HydraOptions) -> None:
    """Print what Hydra itself knows: ``--info``, ``--hydra-help``, ``--cfg hydra``, ``--shell-completion``."""
    root = _root(command)
    texts = _for_hydra(options.overrides, schema)
    with _explain_hydra_errors(), config_dir.hydra(_overlays(options.overrides)) as hydra:
        if options.shell_completion:
            hydra.shell_completion(root, list(options.overrides))
        elif options.hydra_help:
            keys = list(filter(is_hydra_key, texts))
            hydra.hydra_help(root, get_args_parser(), argparse.Namespace(overrides=keys, resolve=False))
        elif options.info:
            before = logging.root.handlers[:], logging.root.level, logging.raiseExceptions
            logging.raiseExceptions = False  # it prints through the log, and the reader may have enough
            try:
                hydra.show_info(options.info, root, texts)
            finally:
                logging.root.handlers[:], logging.root.level, logging.raiseExceptions = before
        else:
            hydra.show_cfg(root, texts, options.cfg or "all", options.package, options.resolve)


def run(command: str, schema: type, options: HydraOptions, job: Callable[[], int]) -> int:
    """Do one job within Hydra: its output folder, logging, environment and callbacks are those of ``hydra.…``.

    Returns:
        the exit code that the job gives.
    """
    root = _root(command)
    texts = _for_hydra(options.overrides, schema)
    codes: list[int] = []
    raised: list[BaseException] = []

    def task(config: Any) -> None:
        try:
            codes.append(job())
        except BaseException as error:  # Hydra has words of its own for it
            raised.append(error)

    with config_dir.hydra(_overlays(options.overrides)) as hydra, _explain_hydra_errors():
        hydra.run(root, task, texts)
    if raised:
        raise raised[0]
    return codes[0]


def sweep(
    command: str,
    schema: type,
    options: HydraOptions,
    plan: Callable[[list[list[str]] | None, list[str], Path], Callable[[Any], float]],
) -> None:
    """Run several jobs with the chosen sweeper and launcher.

    Args:
        plan: given the overrides of each job, or None where the sweeper finds them as it goes on, the keys that are
            swept over, and the folder of the runs, gives the function that does one job. It must be one that can be
            pickled: a launcher may call it in another process.

    Raises:
        UserError: what Hydra says of the overrides.
    """
    root = _root(command)
    with _explain_hydra_errors():
        texts = _for_hydra(options.overrides, schema, sweep=True)
    with config_dir.hydra(_overlays(options.overrides)) as hydra:
        with _explain_hydra_errors():
            config = hydra.compose_config(root, texts, RunMode.MULTIRUN)
            params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
            tasks = itertools.filterfalse(is_hydra_key, texts)
            parsed = OverridesParser.create(hydra.config_loader).parse_overrides([*params, *tasks])
            swept = [_key(each) for n, each in enumerate(parsed) if n < len(params) or each.is_sweep_override()]
            _require_countable(parsed)
            # Of another sweeper only it knows the jobs.
            is_grid = config.hydra.sweeper["_target_"].endswith(".BasicSweeper")
            jobs = BasicSweeper.split_arguments(parsed, None)[0] if is_grid else None
        if jobs is not None and not jobs:
            raise UserError("-m: gives no jobs.", "Look at the values that are swept over.")
        function = plan(jobs, swept, Path(str(config.paths.runs)))
        try:
            with _explain_hydra_errors():
                hydra.multirun(root, partial(_do, function), texts)
        except _Raised as error:
            raise error.args[0] from None


class _Raised(Exception):
    """What a job has raised: it is not Hydra's to explain."""


def _do(function: Callable[[Any], float], config: Any) -> float:
    try:
        return function(config)
    except Exception as error:
        raise _Raised(error) from error


def current_overrides() -> list[str]:
    """The overrides of the job that a launcher is doing."""
    return list(HydraConfig.get().overrides.task)


def _require_countable(overrides: Sequence[Override]) -> None:
    """Refuse an unreasonable number of jobs, before there is a list of them."""
    count = 1
    for override in overrides:
        if override.is_discrete_sweep():
            count *= sum(1 for _ in itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1))
        if count > MAX_JOBS:
            raise UserError(f"-m: {str(override.input_line).lstrip('+')}: makes more than {MAX_JOBS:,} jobs.")


def to_command_overrides(texts: Sequence[str], schema: type, typed: Sequence[str]) -> list[str]:
    """The overrides of a job as a command of ours takes them.

    Args:
        texts: as Hydra gives them. Text loses the quotes of Hydra's grammar: ours has none.
        typed: what the user typed: Hydra knows no paths of experiments, and nothing of what is deleted.
    """
    paths = {_stem(name): name for name in take_key(typed, "experiment")[0].split(",")}
    found = []
    for text in texts:
        key, raw, problem = split_override(text)
        if problem:
            found.append(text)
        elif key == "experiment":
            found.append(f"experiment={paths.get(raw, raw)}")
        elif key == "stage.name":  # of a stage without a file: a job knows it by its class alone
            found = [*(each for each in found if not each.startswith("stage=")), f"stage={raw}"]
        elif is_text(_type_of(schema, key)):
            value = OverridesParser.create().parse_override(f"{key}={raw}").value()
            found.append(f"{key}={'null' if value is None else value}")
        else:
            found.append(f"{key}={raw}")
    return [*found, *(text for text in typed if text.startswith("~") and not _names_objects(schema, text[1:]))]


def _type_of(schema: type, key: str) -> Any:
    """The type of a key, ``stages.STEP.KEY`` of a pipeline included."""
    return type_of_key(schema, key.split(".", 2)[2] if key.startswith("stages.") and key.count(".") >= 2 else key)


def _names_objects(schema: type, key: str) -> bool:
    return is_object_group(type_of_key(schema, key))


def _for_hydra(texts: Sequence[str], schema: type, sweep: bool = False) -> list[str]:
    """The overrides in Hydra's grammar.

    ``++`` stands where they set a value: every key is known to the settings, if not to the files. Text is quoted where
    it is no sweep. What is deleted is not Hydra's to delete: it does not count a null as something.
    """
    groups = {*groups_of(schema), "experiment"}
    found = []
    for text in texts:
        key, raw, problem = split_override(text)
        if key.startswith("~"):
            found += [f"{key[1:]}=[]"] * _names_objects(schema, key[1:])
        elif problem or is_hydra_key(key):
            found.append(text)
        elif key == "experiment":
            found.append(f"experiment={','.join(map(_stem, raw.split(',')))}")
        elif key == "stage" and raw not in config_dir.groups()["stage"] and name_of_stage(raw) in all_stages():
            file = all_stages()[name_of_stage(raw)].config_file
            found += [f"stage={file}", f"++stage.name={raw}", "++stage.parent=null"]  # turned back for the command
        elif key in groups and not raw.startswith("{"):
            found.append(f"{key}={raw}")
        elif is_text(_type_of(schema, key)) and raw != "null" and not (sweep and _has_grammar(key, raw)):
            found.append(f"++{key}={QuotedString(raw, Quote.double).with_quotes()}")
        else:
            found.append(f"++{key}={raw}")
    return found


def _has_grammar(key: str, raw: str) -> bool:
    """Whether a text is one for Hydra to read, in a sweep: several values, or one in quotes."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={raw}")
    except HydraException as error:
        raise UserError(f"{key}={raw}: cannot be read, in a sweep: {first_line(error)}.", _QUOTES) from error
    return override.is_sweep_override() or isinstance(override._value, QuotedString)


def _overlays(texts: Sequence[str]) -> dict[str, Any]:
    """The experiments that are named, by their names in Hydra; where that is a choice of a kind of its own, all."""
    raw = take_key(texts, "experiment")[0]
    names = raw.split(",") if re.fullmatch(r"[^()\[\]{}'\"]*", raw) else config_dir.experiments()
    named = dict.fromkeys(filter(None, map(str.strip, names)))
    if len({*map(_stem, named)}) < len(named):
        raise UserError(f"experiment={raw}: two of these files have the same name.", "Rename one of them.")
    return {_stem(name): overlay_of(name) for name in named}


def _stem(experiment: str) -> str:
    return Path(experiment).stem if experiment.endswith((".yaml", ".yml")) else experiment


def _root(command: str) -> str:
    """The root file: a pipeline is composed as its stages are."""
    return config_dir.root_file("train" if command == "pipeline" else command)


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+")


class _explain_hydra_errors:
    """What Hydra and its plugins refuse, in one line; they have many ways to say it."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, _HYDRA_ERRORS):
            lines = [line.strip() for line in str(error).replace("++", "").splitlines() if line.strip()]
            said = " ".join(lines[: None if "Available options" in str(error) else 2])
            raise UserError(f"Hydra: {said or type(error).__name__}") from error


_HYDRA_ERRORS = (
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
