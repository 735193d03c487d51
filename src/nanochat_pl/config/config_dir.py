"""Where the configuration is: the checkout's folders, or the copies that an installed wheel carries."""

from __future__ import annotations

from pathlib import Path

import nanochat_pl
from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.text_files import require_regular
from nanochat_pl.common.user_path import user_path

EXPERIMENTS = "conf_experiments"


def config_folder() -> Path:
    """The folder of the root files and groups (``configs/``), absolute."""
    return _folder("configs")


def experiment_folder() -> Path:
    """The folder of the shipped experiments (``conf_experiments/``), absolute."""
    return _folder(EXPERIMENTS)


def groups() -> dict[str, list[str]]:
    """The config groups and the choices of each, in sorted order."""
    folders = sorted(folder for folder in config_folder().iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def experiments() -> list[str]:
    """Names of the shipped experiments, sorted."""
    return sorted(file.stem for file in experiment_folder().glob("*.yaml"))


def experiment_file(name: str) -> Path:
    """The file of an experiment: a shipped one by its name, anybody's by its path (``mine.yaml``, ``a/mine.yaml``)."""
    if name.endswith((".yaml", ".yml")):
        path = Path(user_path("experiment", name))
        require_regular(path)
        if not path.exists():
            raise UserError(f"experiment={name}: there is no such file.")
        return path
    if name not in experiments():
        raise UserError(
            f"experiment={name!r}: there is no such experiment; {did_you_mean(name, experiments())}",
            f"Experiments are the files of {experiment_folder()}; one of your own is named by its path, with .yaml.",
        )
    return experiment_folder() / f"{name}.yaml"


def _folder(name: str) -> Path:
    package = Path(nanochat_pl.__file__).resolve().parent
    checkout = package.parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return package / name
