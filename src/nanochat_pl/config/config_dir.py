"""Where the configuration is: the checkout's folders, or the copies of an installed wheel; and a folder of the user's.

That one (``--config-dir DIR``, as in any Hydra program) has the layout of ``configs/``: DIR/optim/x.yaml is
``optim=x``, DIR/experiment/x.yaml is ``experiment=x``. Its files come before ours of the same name.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import nanochat_pl
from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.files import entries
from nanochat_pl.common.text_files import require_regular
from nanochat_pl.common.user_path import user_path

EXPERIMENTS = "conf_experiments"
# Of --config-dir and --config-name: in the environment, so that the processes of a pipeline or a sweep have them too.
OWN_FOLDER, ROOT_NAME = "NANOCHAT_PL_CONFIG_DIR", "NANOCHAT_PL_CONFIG_NAME"
LIKE_TRAIN = ("train", "plan", "doctor", "tokenize")  # commands with the settings of a training


def config_folder() -> Path:
    """The folder of the root files and groups (``configs/``), absolute."""
    return _folder("configs")


def experiment_folder() -> Path:
    """The folder of the shipped experiments (``conf_experiments/``), absolute."""
    return _folder(EXPERIMENTS)


@contextlib.contextmanager
def chosen(folder: str | None, root: str | None) -> Iterator[None]:
    """While it lasts, look into a folder of the user's own too, and take another root file for a training.

    Raises:
        UserError: there is no such folder or file.
    """
    before = {name: os.environ.get(name) for name in (OWN_FOLDER, ROOT_NAME)}
    try:
        if folder is not None:
            path = Path(user_path("--config-dir", folder)).absolute()
            if not path.is_dir():
                raise UserError(f"--config-dir {folder}: is not a folder.")
            entries(path)  # it can be read
            os.environ[OWN_FOLDER] = str(path)
        if root is not None:
            name = root.removesuffix(".yaml")
            known = sorted({name for each in folders() for name in _names(each)})
            if name not in known:
                raise UserError(f"--config-name {root}: there is no such file; {did_you_mean(name, known)}")
            os.environ[ROOT_NAME] = name
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def root_file(command: str) -> str:
    """The root file of a command, without ``.yaml``: ``--config-name`` names another one for a training."""
    return os.environ.get(ROOT_NAME, command) if command in LIKE_TRAIN else command


def groups() -> dict[str, list[str]]:
    """The config groups and the choices of each, in sorted order; one in a folder of the group is ``FOLDER/NAME``."""
    found: dict[str, set[str]] = {}
    for folder in folders():
        for group in entries(folder):
            if group.is_dir() and group.name != "experiment":
                found.setdefault(group.name, set()).update(_names_with_folders(group))
    return {name: sorted(found[name]) for name in sorted(found)}


def group_file(group: str, choice: str) -> Path:
    """The file of a choice that exists."""
    return next(path for folder in folders() if (path := folder / group / f"{choice}.yaml").is_file())


def experiments() -> list[str]:
    """Names of the experiments that are found by their names, sorted; one in a folder is ``FOLDER/NAME``."""
    names = set()
    for folder in _experiment_folders():
        names.update(_names_with_folders(folder))
    return sorted(names)


def experiment_file(name: str) -> Path:
    """The file of an experiment: a known one by its name, any by its path (``mine.yaml``, ``a/mine.yaml``)."""
    if name.endswith((".yaml", ".yml")):
        path = Path(user_path("experiment", name))
        require_regular(path)
        if not path.exists():
            raise UserError(f"experiment={name}: there is no such file.")
        return path
    if name not in experiments():
        raise UserError(
            f"experiment={name!r}: there is no such experiment; {did_you_mean(name, experiments())}",
            f"Experiments are the files of {experiment_folder()} and of DIR/experiment with --config-dir DIR; any other"
            " is named by its path, with .yaml.",
        )
    return next(path for folder in _experiment_folders() if (path := folder / f"{name}.yaml").is_file())


@contextlib.contextmanager
def hydra(experiments: Mapping[str, Any] = MappingProxyType({})) -> Iterator[Hydra]:
    """Hydra with these folders as its search path, and these experiments by name in its group ``experiment``."""
    search_path = create_config_search_path(str(config_folder()))
    for folder in folders()[:-1]:
        search_path.prepend("command-line", f"file://{folder}")
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    with tempfile.TemporaryDirectory() as flattened:  # before the user's folder, whose files may include others
        for name, overlay in experiments.items():
            path = Path(flattened) / "experiment" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# @package _global_\n{OmegaConf.to_yaml(OmegaConf.create(overlay))}", encoding="utf-8")
        if experiments:
            search_path.prepend("experiments", f"file://{flattened}")
        try:
            yield Hydra.create_main_hydra2("nanochat-pl", search_path)
        finally:
            GlobalHydra.instance().clear()


def folders() -> list[Path]:
    """The folders of root files and groups: the user's own, if there is one, and then ours."""
    own = os.environ.get(OWN_FOLDER)
    return [*([Path(own)] if own else []), config_folder()]


def _names(folder: Path) -> list[str]:
    """The names of the YAML files in a folder."""
    listed = entries(folder) if folder.is_dir() else []
    return [path.stem for path in listed if path.suffix == ".yaml" and path.is_file()]


def _names_with_folders(folder: Path) -> list[str]:
    """The names of the YAML files in a folder, and of those in its folders, ``FOLDER/NAME``."""
    below = [path for path in entries(folder) if path.is_dir()] if folder.is_dir() else []
    return [*_names(folder), *(f"{path.name}/{name}" for path in below for name in _names(path))]


def _experiment_folders() -> list[Path]:
    return [*(folder / "experiment" for folder in folders()[:-1]), experiment_folder()]


def _folder(name: str) -> Path:
    package = Path(nanochat_pl.__file__).resolve().parent
    checkout = package.parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return package / name
