"""What `nanochat-pl evaluate` does once its settings are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from nanochat_pl.bundle.bundle import Bundle, load_bundle
from nanochat_pl.bundle.layout import MODEL, STAGE, TOKENIZER
from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.cli.evaluate_settings import EvaluateConfig, asked, places
from nanochat_pl.cli.evaluate_suites import Trained, can_be_opened, open_jobs
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import ensure_folder, write_json
from nanochat_pl.config.compose import Composed
from nanochat_pl.distributed import coordination
from nanochat_pl.evaluation.compare import Other, comparable, locate_other, read_other, require_can_be_asked
from nanochat_pl.evaluation.jobs import Job, identity_of, measure, of_most_problems
from nanochat_pl.evaluation.results import METRICS_VERSION
from nanochat_pl.evaluation.suites import RESULTS, Evaluation, Suite, SuiteResult, read_results
from nanochat_pl.evaluation.tables import (
    remove_tables,
    show_differences,
    show_own_validation,
    write_differences,
    write_suite,
)
from nanochat_pl.training.device import own_device, require_own_gpus


def evaluate(config: EvaluateConfig, source: Path, to: Path) -> None:
    """Measure a bundle as the settings ask, on all processes of this launch together; write and show the results."""
    runs, against = Path(config.paths.runs), config.against
    other = None if against is None else coordination.raise_on_all_ranks(lambda: locate_other(against, runs))
    bundle = coordination.raise_on_all_ranks(lambda: _load(source, config))
    require_own_gpus(next(bundle.net.parameters()).device, "accelerator")
    jobs, left_out = open_jobs(Trained(source, bundle.stage), config)
    model = coordination.run_on_rank_zero(partial(identity_of, bundle))
    theirs = _known_of_other(other, jobs, to, model)
    coordination.run_on_rank_zero(lambda: str(ensure_folder(to)))
    suites = measure(bundle, jobs, model, to)
    if config.suites is None and not any(suite.tasks or suite.metrics for suite in suites):
        show_own_validation(bundle.stage)
    origin = {
        "bundle": str(source),
        "stage": bundle.stage.stage,
        "model": model,
        "version": METRICS_VERSION,
        "settings": asked(config),
        "left_out": left_out,
    }
    del bundle  # the other model may need the memory
    if other is not None and other.bundle is not None:
        theirs = _measure_other(other, other.bundle, jobs, config, to)

    def write() -> None:
        compared = [] if other is None else _compared(suites, theirs, other.name)
        _write(to, origin, of_most_problems(to, model, jobs, suites), compared)
        if other is not None:
            show_differences(other.name, compared)

    coordination.run_on_rank_zero(write)
    rank_zero_print(f"results: {to / RESULTS}")


def is_measured(composed: Composed[EvaluateConfig]) -> bool:
    """Whether these metrics of this model are there already, and no suite that was left out can be measured by now.

    What they are compared with may have changed.
    """
    source, to = places(composed.config, composed.experiment)
    results = to / RESULTS
    if composed.config.against is not None or not results.is_file():
        return False
    if results.stat().st_mtime_ns < (source / STAGE).stat().st_mtime_ns:
        return False
    before = _read_undamaged(to).origin
    if before.get("settings") != asked(composed.config) or before.get("version") != METRICS_VERSION:
        return False
    left_out, model = before.get("left_out") or [], Trained(source, load_stage_info(source))
    return not any(can_be_opened(suite, model, composed.config) for suite in left_out)


def _load(source: Path, config: EvaluateConfig) -> Bundle:
    """The model on this process's device."""
    if not (source / TOKENIZER).is_file():
        raise UserError(f"{source}: has no tokenizer, so nothing can be measured.")
    return load_bundle(source, own_device(config.accelerator, "accelerator"), config.dtype)


def _known_of_other(other: Other | None, jobs: Sequence[Job], to: Path, model: Mapping[str, Any]) -> list[SuiteResult]:
    """What a folder of results says of the same problems, on the main process; nothing of a model.

    Raises:
        UserError: nothing can be compared: said before anything is measured.
    """
    found: list[SuiteResult] = []

    def read() -> None:
        if other is None:
            return
        metrics = comparable(jobs, other.name)
        if other.bundle is not None:
            require_can_be_asked(other.bundle, metrics)
        else:
            found.extend(read_other(other, metrics, to, model))

    coordination.run_on_rank_zero(read)
    return found


def _measure_other(
    other: Other, folder: Path, jobs: Sequence[Job], config: EvaluateConfig, to: Path
) -> list[SuiteResult]:
    """The other model on the same problems; what it was measured on before is taken."""
    rank_zero_print(f"Now {other.name}, on the same problems:")
    bundle = coordination.raise_on_all_ranks(lambda: _load(folder, config))
    model = coordination.run_on_rank_zero(partial(identity_of, bundle))
    own = to / "against" / f"{bundle.stage.stage}-{model[MODEL][:16]}"
    return measure(bundle, comparable(jobs, other.name), model, own, other.results)


def _compared(mine: Sequence[SuiteResult], theirs: Sequence[SuiteResult], name: str) -> list[SuiteResult]:
    """The suites that both have, with the differences."""
    others = {suite.name: suite for suite in theirs}
    return [suite.compared_with(others[suite.name], name) for suite in mine if suite.name in others]


def _write(to: Path, origin: Mapping[str, Any], suites: Sequence[SuiteResult], compared: Sequence[SuiteResult]) -> None:
    """All files for people and programs. Suites that were measured of the same model before stay in results.json."""
    before = _read_undamaged(to)
    is_same = all(before.origin.get(key) == origin[key] for key in ("model", "version"))
    found = dict(before.suites) if is_same else {}
    found |= {suite.name: suite for suite in suites}
    for each in compared:
        found[each.name] = replace(
            found[each.name],
            against=each.against,
            differences=each.differences,
            summary_difference=each.summary_difference,
            plain=each.plain,
        )
    found = {name: found[name] for name in get_args(Suite) if name in found}
    remove_tables(to, before.suites.values(), found.values())
    for suite in suites:
        write_suite(to, suite)
    write_differences(to, found.values())
    write_json(to / RESULTS, Evaluation(dict(origin), found).to_json(), surrogates=True)


def _read_undamaged(folder: Path) -> Evaluation:
    """What an earlier results.json says; nothing where it is damaged: it will be written anew."""
    try:
        return read_results(folder)
    except UserError:
        return Evaluation()
