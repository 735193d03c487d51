"""Which folders a command means: ``bundle=PATH``, or ``run=NAME`` with a stage; and where the caches are."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import StageFolder, finished_stage, list_runs, newest_stage
from nanochat_pl.common.schema import UserPath, setting


@dataclass(frozen=True)
class PathsSettings:
    """Group `paths`: where things are kept."""

    runs: UserPath = setting("runs", "Folder of all runs.")
    cache: UserPath | None = setting(None, "Folder of corpora and token caches; null: the user's cache folder.")
    hub: UserPath | None = setting(
        None,
        "Folder with data sets of a hub, datasets/OWNER/NAME/…, looked at before what was downloaded.",
    )

    @property
    def hub_folder(self) -> Path | None:
        """``hub`` as a path."""
        return Path(self.hub) if self.hub else None


def locate_bundle(bundle: str | None, run: str | None, stage: str | None, runs: Path) -> Path:
    """The folder of the bundle. Raises :class:`UserError` for one that is not there, or for two answers at once."""
    if bundle is not None:
        if run is not None or stage is not None:
            raise UserError("bundle: names a model by itself; leave run= and stage= out.")
        if (Path(bundle) / "bundle").is_dir():
            raise UserError(
                f"bundle={bundle}: is the folder of a stage.", f"Its bundle: bundle={Path(bundle) / 'bundle'}"
            )
        if Path(bundle).suffix == ".ckpt" and Path(bundle).is_file():
            raise UserError(f"bundle={bundle}: is a resume file.", "A bundle is a folder: runs/NAME/STAGE/bundle.")
        if not Path(bundle).is_dir():
            raise UserError(f"bundle={bundle}: there is no such folder.", "nanochat-pl runs lists what is there.")
        return Path(bundle)
    return locate_stage(run, stage, runs).bundle


def locate_stage(run: str | None, stage: str | None, runs: Path) -> StageFolder:
    """The stage that ``run`` and ``stage`` mean; without ``run`` the only run there is."""
    run = run or only_run(runs)
    return finished_stage(runs, run, stage) if stage else newest_stage(runs, run)


def only_run(runs: Path) -> str:
    """The name of the only run. Raises :class:`UserError` that lists them where there are several, or none."""
    names = list(list_runs(runs))
    if len(names) == 1:
        return names[0]
    if names:
        raise UserError(f"run: is missing; {runs} has {', '.join(names)}.", "Say which: run=NAME.")
    raise UserError(
        f"{runs}: there are no runs.",
        "Train one: nanochat-pl pipeline experiment=demo; or give its folder, paths.runs=…",
    )


def run_keys(run: str, runs: Path) -> str:
    """The keys by which a command finds a run: its name, and the folder of runs where that is not the usual one."""
    elsewhere = "" if runs == Path(PathsSettings().runs) else f" {shlex.quote(f'paths.runs={runs}')}"
    return f"run={run}{elsewhere}"


def cache_folder(paths: PathsSettings) -> Path:
    """The folder of corpora and token caches: ``paths.cache``, else the user's cache folder."""
    return Path(paths.cache) if paths.cache else Path(platformdirs.user_cache_dir("nanochat_pl"))
