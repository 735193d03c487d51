"""Measures a trained stage: suites of tasks, bits per byte, samples; as tables, JSON and CSV.

nanochat-pl evaluate run=demo
nanochat-pl evaluate run=demo stage=base suites=[bpb,core,samples]
nanochat-pl evaluate bundle=PATH to=FOLDER
nanochat-pl evaluate run=new against=demo
torchrun --nproc-per-node 8 -m nanochat_pl.cli.main evaluate run=demo

Each finished task is kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from nanochat_pl.bundle import Bundle, load_bundle, naming_weights
from nanochat_pl.bundle.bundle import STAGE, TOKENIZER, load_stage_info
from nanochat_pl.cli.evaluate_against import Other, comparable, known_results, label_of, locate_other, require_pairs
from nanochat_pl.cli.evaluate_records import find, identity_of, of_more_problems, write_record
from nanochat_pl.cli.evaluate_settings import EvaluateConfig, Suite, asked, places
from nanochat_pl.cli.evaluate_suites import Job, Measured, Unread, can_be_opened, open_jobs
from nanochat_pl.cli.evaluate_tables import (
    SuiteResult,
    remove_tables,
    show_differences,
    show_suite,
    write_differences,
    write_suite,
)
from nanochat_pl.cli.launch import launch, processes_to_start
from nanochat_pl.cli.train import require_same_settings_everywhere
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import ensure_folder, read_json, write_json
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.distributed import coordination
from nanochat_pl.evaluation.results import FIGURES_VERSION
from nanochat_pl.training.device import own_device, require_own_gpus

Config = EvaluateConfig
EXTRA_KEYS = {"experiment=NAME": "Take the settings of an experiment file (its section evaluate)."}
RESULTS = "results.json"


def run(arguments: Sequence[str]) -> int:
    """The command."""
    composed = coordination.raise_on_all_ranks(lambda: compose_step("evaluate", "evaluate", EvaluateConfig, arguments))
    config = composed.config
    if (number := coordination.raise_on_all_ranks(lambda: processes_to_start(config.accelerator, config.devices))) > 1:
        return launch(["evaluate", *arguments], number)
    require_same_settings_everywhere(composed)
    source, to = coordination.raise_on_all_ranks(lambda: places(config, composed.experiment))
    runs, against = Path(config.paths.runs), config.against
    other = None if against is None else coordination.raise_on_all_ranks(lambda: locate_other(against, runs))
    bundle = coordination.raise_on_all_ranks(lambda: _load(source, config))
    require_own_gpus(next(bundle.net.parameters()).device, "accelerator")
    jobs, left_out = open_jobs(bundle, config)
    if other is not None:
        coordination.raise_on_all_ranks(lambda: require_pairs(other, jobs))
    coordination.run_on_rank_zero(lambda: str(ensure_folder(to)))
    identity = coordination.run_on_rank_zero(partial(identity_of, bundle))
    theirs = None if other is None or other.bundle is not None else _read_results(other, jobs, to, identity)
    suites = _measure(bundle, jobs, identity, to)
    origin = {
        "bundle": str(source),
        "stage": bundle.stage.stage,
        "model": identity,
        "version": FIGURES_VERSION,
        "settings": asked(config),
        "left_out": left_out,
    }
    del bundle  # the other model may need the memory
    compared = {} if other is None else _compare(other, theirs, jobs, suites, config, to)
    coordination.run_on_rank_zero(
        lambda: _write(to, origin, _of_most_problems(to, identity, jobs, suites), compared, other)
    )
    rank_zero_print(f"results: {to / RESULTS}")
    return 0


def is_measured(composed: Composed[EvaluateConfig]) -> bool:
    """Whether these figures of this model are there already, and no suite that was left out can be measured by now.

    What they are compared with may have changed.
    """
    source, to = places(composed.config, composed.experiment)
    results = to / RESULTS
    if composed.config.against is not None or not results.is_file():
        return False
    if results.stat().st_mtime_ns < (source / STAGE).stat().st_mtime_ns:
        return False
    before = _object(results)
    if before.get("settings") != asked(composed.config) or before.get("version") != FIGURES_VERSION:
        return False
    left_out, model = before.get("left_out") or [], Unread(source, load_stage_info(source))
    return not any(can_be_opened(suite, model, composed.config) for suite in left_out)


def _load(source: Path, config: EvaluateConfig) -> Bundle:
    """The model on this process's device."""
    if not (source / TOKENIZER).is_file():
        raise UserError(f"{source}: has no tokenizer, so nothing can be measured.")
    return load_bundle(source, own_device(config.accelerator, "accelerator"), config.dtype)


def _measure(
    bundle: Bundle, jobs: Sequence[Job], identity: Mapping[str, Any], to: Path, known: Path | None = None
) -> list[SuiteResult]:
    """Do what has not been done yet, and keep each task as soon as it is finished.

    Args:
        bundle: the model.
        jobs: what to measure.
        identity: of the model's files.
        to: the folder of its results.
        known: another folder where there may be some.

    Returns:
        what was found, of each suite; whole on the main process.
    """
    found: dict[int, Measured] = {}

    def look() -> list[int]:
        again: dict[tuple[str, str], list[str]] = {}
        for number, job in enumerate(jobs):
            measured, why = find(to, identity, job)
            if measured is None and known is not None:
                measured, _ = find(known, identity, job)
            if measured is not None:
                found[number] = measured
            elif why:
                again.setdefault((job.suite, why), []).append(job.name)
        for (suite, why), names in again.items():
            rank_zero_print(f"Measured again ({suite}): {', '.join(names)}. {why}")
        return [*found]

    done = coordination.run_on_rank_zero(look)
    if done:
        rank_zero_print(f"Measured before: {', '.join(jobs[number].name for number in done)}.")
    suites = []
    for suite, numbers in itertools.groupby(range(len(jobs)), key=lambda number: jobs[number].suite):
        result = SuiteResult(suite)
        for number in numbers:
            job = jobs[number]
            if number not in done:
                with naming_weights(bundle):
                    found[number] = job.run(bundle)
                for each in found[number].results:
                    rank_zero_print(f"{each.name}: {100 * each.accuracy:.1f} ± {100 * each.stderr:.1f} %, n {each.n:,}")
                coordination.run_on_rank_zero(lambda: write_record(to, identity, job, found[number]))  # noqa: B023
            if number in found:
                result.add(found[number])
        coordination.run_on_rank_zero(lambda: show_suite(result))  # noqa: B023
        suites.append(result)
    return suites


def _of_most_problems(
    to: Path, identity: Mapping[str, Any], jobs: Sequence[Job], suites: Sequence[SuiteResult]
) -> list[SuiteResult]:
    """What is written of each suite: of each task the figures of most problems, those of fewer beside them."""
    written = []
    for suite in suites:
        mine = [job for job in jobs if job.suite == suite.suite]
        larger = {job.name: more for job in mine if (more := of_more_problems(to, identity, job)) and more.results}
        results = [larger[each.name].results[0] if each.name in larger else each for each in suite.results]
        fewer = [each for each in suite.results if each.name in larger]
        if fewer:
            kept = ", ".join(f"{each.name} (n {each.n:,})" for each in results if each.name in larger)
            rank_zero_print(f"{suite.suite}: the figures of more problems stay in the results and the report: {kept}.")
        written.append(SuiteResult(suite.suite, results, suite.plain, fewer))
    return written


def _compare(
    other: Other,
    theirs: list[SuiteResult] | None,
    jobs: Sequence[Job],
    mine: Sequence[SuiteResult],
    config: EvaluateConfig,
    to: Path,
) -> dict[str, dict[str, Any]]:
    """Paired differences by suite. The other model is measured where its results are not here."""
    if theirs is None:
        assert other.bundle is not None
        rank_zero_print(f"Now {other.name}, on the same problems:")
        folder = other.bundle
        bundle = coordination.raise_on_all_ranks(lambda: _load(folder, config))
        identity = coordination.run_on_rank_zero(lambda: identity_of(bundle))
        own = to / "against" / label_of(bundle, identity)
        theirs = _measure(bundle, comparable(jobs), identity, own, other.results)

    def compare() -> dict[str, dict[str, Any]]:
        others = {each.suite: each for each in theirs}
        pairs = [(each, others[each.suite]) for each in mine if each.suite in others]
        return {a.suite: {"against": other.name, **found} for a, b in pairs if (found := a.compared_with(b))}

    return dict(coordination.run_on_rank_zero(compare))


def _read_results(other: Other, jobs: Sequence[Job], to: Path, model: Mapping[str, Any]) -> list[SuiteResult]:
    """What a folder of results says of the same problems; on the main process."""
    suites: dict[str, SuiteResult] = {}

    def read() -> None:
        for job, measured in known_results(other, jobs, to, model):
            suites.setdefault(job.suite, SuiteResult(job.suite)).add(measured)

    coordination.run_on_rank_zero(read)
    return [*suites.values()]


def _write(
    to: Path,
    origin: Mapping[str, Any],
    suites: Sequence[SuiteResult],
    compared: Mapping[str, Mapping[str, Any]],
    other: Other | None,
) -> None:
    """All files for people and programs. Suites that were measured of the same model before stay in results.json."""
    results = to / RESULTS
    before = _object(results) if results.is_file() else {}
    earlier = before["suites"] if isinstance(before.get("suites"), dict) else {}
    kept = earlier if all(before.get(key) == origin[key] for key in ("model", "version")) else {}
    measured = {each.suite: _with(each.to_json(), compared.get(each.suite, {})) for each in suites}
    found = {**kept, **measured}
    found = {name: found[name] for name in get_args(Suite) if name in found}
    remove_tables(to, earlier, found)
    for suite in suites:
        write_suite(to, suite)
    write_differences(to, found)
    write_json(results, {**origin, "suites": found}, surrogates=True)
    if other is not None:
        show_differences(other.name, compared)


def _with(figures: Any, compared: Mapping[str, Any]) -> Any:
    return {**figures, **compared} if isinstance(figures, dict) else figures


def _object(path: Path) -> dict[str, Any]:
    """What an earlier results.json says; nothing where it is none: it will be written anew."""
    try:
        value = read_json(path, surrogates=True)
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}
