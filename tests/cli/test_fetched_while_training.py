"""A training on files of a hub that are not here yet: it begins with the first, and the others come while it runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from nanochat_pl.cli.main import main
from nanochat_pl.training.module import LMModule
from tests.data.test_hub import parquet
from tests.helpers.hub_server import Answer, HubServer, serving_this_process
from tests.training.conftest import tiny_overrides, write_texts

REPO = "some-owner/small"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with three files to train on, known to the process that tokenizes ahead too."""
    texts = (write_texts(here / "texts") / "texts.txt").read_text(encoding="utf-8").split("\n\n")
    with serving_this_process(here / "hf", monkeypatch) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", constants.HF_HUB_CACHE)
        server.add(REPO, {f"part-{number}.parquet": parquet([*texts[number::4]]) for number in range(4)})
        yield server


def train(here: Path, run: str, *more: str) -> int:
    tiny = [text for text in tiny_overrides(here) if not text.startswith(("data", "paths.cache", "max_steps"))]
    keys = ["data=hub", f"data.repo={REPO}", f"paths.cache={here / 'cache'}", "tokenizer.max_chars=8000"]
    # A buffer that the documents of the first file fill.
    packing = ["data.pack_buffer_documents=20", "data.pack_refill_documents=5"]
    return main(["train", "stage=base", *keys, *packing, *tiny, "max_steps=60", f"run={run}", *more])


def is_here(name: str) -> bool:
    return any(path.exists() for path in Path(constants.HF_HUB_CACHE).rglob(name))


def measured(here: Path, run: str) -> object:
    return json.loads((here / "runs" / run / "base" / "finished.json").read_text(encoding="utf-8"))["metrics"]


@pytest.mark.slow
def test_it_begins_before_the_second_file_is_here_and_ends_as_if_all_had_been(
    hub: HubServer, here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, seen = threading.Event(), []
    hub.fail("GET", r"part-1\.parquet", Answer(hold=served))
    real = LMModule.training_step

    def step(stage: LMModule, *arguments: object) -> object:
        if not seen:
            seen.append((is_here("part-0.parquet"), is_here("part-1.parquet")))
            served.set()
        return real(stage, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(LMModule, "training_step", step)
        assert train(here, "a", "data.download=true") == 0
    assert seen == [(True, False)]
    said = capsys.readouterr().out
    assert f"{REPO}: 3 files, 0.00 GB, are fetched while the training runs; it begins" in said
    assert f"{REPO}: by the text of the first file it is 3 files to train on" in said
    assert "3 of 3 files" in said
    assert all(is_here(f"part-{number}.parquet") for number in range(4))
    hub.requests.clear()
    assert train(here, "b") == 0
    assert hub.requests == [] and measured(here, "a") == measured(here, "b")


@pytest.mark.slow
def test_a_file_that_cannot_be_fetched_ends_the_run_which_goes_on_when_it_can(
    hub: HubServer, here: Path, capsys: Captured
) -> None:
    hub.fail("HEAD", r"part-1\.parquet", *[Answer(status=403)] * 9)
    assert train(here, "a", "data.download=true") == 2
    err = capsys.readouterr().err
    assert f"{REPO}: part-1.parquet: the hub refuses it (403)" in err and err.count("error:") == 1
    assert "data.download=false" in err and f"nanochat-pl download data=hub data.repo={REPO}" in err
    assert list((here / "runs" / "a" / "base" / "checkpoints").glob("step=*.ckpt"))
    hub.mend()
    assert train(here, "a", "data.download=true") == 0
    assert "going on after step" in capsys.readouterr().out
    assert train(here, "b") == 0
    assert measured(here, "a") == measured(here, "b")


@pytest.mark.parametrize("case", ["not asked for", "forbidden", "no network"])
def test_without_a_way_to_the_hub_it_is_one_error_with_the_command(
    case: str, hub: HubServer, here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "forbidden":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if case == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    download = "false" if case == "not asked for" else "true"
    assert train(here, "a", f"data.download={download}") == 2
    err = capsys.readouterr().err
    other = "data.download=true fetches it" if download == "false" else "data.download=false keeps to what is here"
    assert err.count("error:") == 1 and other in err
    assert f"nanochat-pl download data=hub data.repo={REPO} paths.cache={here / 'cache'} num_shards=" in err
    assert not (here / "runs" / "a").exists()
