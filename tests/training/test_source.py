"""Which text a stage trains on: chosen once for a run, in the order and with the files that there is room for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from nanochat_pl.cli.main import main
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.run_dir import stage_folder
from nanochat_pl.data.cache import disk_space
from nanochat_pl.data.cache.disk_space import bytes_to_make, require_cache_room
from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.sources import auto
from nanochat_pl.data.sources import base as sources
from nanochat_pl.data.sources.auto import read_choice
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.hub import HubFiles
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.data.sources.token_counts import text_facts, tokens_at_hand
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.training.config import StageSettings, TrainConfig
from nanochat_pl.training.stage_data.source import chosen_data, tokens_planned, with_chosen_data
from tests.helpers.fake_data import ByteTokenizer
from tests.training.conftest import tiny_overrides, weights_of, write_texts


def config(**keys: object) -> TrainConfig:
    return TrainConfig(**{"data": DataSettings(name="auto"), **keys})  # type: ignore[arg-type]


@pytest.fixture
def no_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "built_python_docs", lambda cache_dir: None)
    monkeypatch.setattr(auto, "open_python_docs", lambda *_, **__: pytest.fail("nothing is to be built"))


def test_depth_20_takes_155_files_of_climbmix_wherever_they_are_counted(no_docstrings: None, tmp_path: Path) -> None:
    large = config(model=ModelSettings(depth=20))
    data = with_chosen_data(large, stage_folder(tmp_path, "a", "base"), tmp_path, resuming=False).data
    assert (data.name, data.download, data.long_documents) == ("climbmix", True, "crop")
    needed = tokens_planned(large)(None)
    for download, other in ((False, "data.download=true fetches it"), (True, "data.download=false")):
        given = dataclasses.replace(data, download=download)
        with pytest.raises(UserError) as error:
            HubFiles(given, tmp_path, tokens_needed=needed)
        assert error.value.fix.endswith("num_shards=155") and other in error.value.fix
    facts = text_facts(data, tmp_path)
    assert (facts.num_shards, facts.fetched, facts.streamed) == (6_542, True, True)
    assert tokens_at_hand(data, tmp_path) == pytest.approx(6_542 * 250e6 / 4.8)
    assert tokens_at_hand(dataclasses.replace(data, download=False), tmp_path) is None


def test_a_run_keeps_its_choice_and_its_stages_have_the_same(
    no_docstrings: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = stage_folder(tmp_path / "runs", "a", "base")
    base.create()
    large = config(model=ModelSettings(depth=20))
    assert with_chosen_data(large, base, tmp_path, resuming=False).data.name == "climbmix"
    assert read_choice(base.chosen_source) == "web" and "data=auto: climbmix, as the plan's" in capsys.readouterr().out
    smaller = config(max_steps=1)  # with changes that resume_with_changes allows
    assert with_chosen_data(smaller, base, tmp_path, resuming=True).data.name == "climbmix"
    seen = chosen_data(smaller, base, tmp_path)
    assert (seen.name, seen.download) == ("climbmix", False), "who looks fetches nothing"
    sft = stage_folder(tmp_path / "runs", "a", "sft")
    tuned = with_chosen_data(config(stage=StageSettings(name="sft")), sft, tmp_path, resuming=False)
    assert tuned.data.name == "climbmix"
    given = config(data=DataSettings(name="local", path="x"))
    assert with_chosen_data(given, base, tmp_path, resuming=False) is given


@pytest.mark.slow
def test_very_much_text_is_trained_on_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of a terabyte was tokenized before the first step."""
    write_texts(tmp_path / "texts")
    train = ["train", "stage=base", *tiny_overrides(tmp_path), "max_steps=12"]
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MAX_TEXT_AT_ONCE", 1_000)
        assert main([*train, "run=a"]) == 0
    assert re.search(r"local: more than \S+ GB of text, so its order is .*shuffle=shards", capsys.readouterr().out)
    assert main([*train, "run=b", "data.shuffle=shards"]) == 0
    one, other = (weights_of(tmp_path / "runs" / run, "base") for run in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_disk_has_room_for_the_tokens_that_are_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(10):
        text = "\n\n".join(f"text {n} of {number} " * 40 for n in range(200))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    data = DataSettings(name="local", path=str(folder), txt_document_chars=700)
    source, tokenizer, cache = open_source(data, tmp_path / "cache"), ByteTokenizer(), tmp_path / "cache"

    def needed(num_tokens: float = 1, **keys: object) -> int:
        settings = dataclasses.replace(data, **keys)  # type: ignore[arg-type]
        return bytes_to_make(source, settings, tokenizer, cache, num_tokens=num_tokens, sequence_len=512)  # type: ignore[arg-type]

    whole = needed()
    assert whole == pytest.approx(size / 4.8 * 2, rel=0.05)
    assert needed(shuffle="shards") == pytest.approx(whole / 10, rel=0.05), "the first file is enough"
    assert needed(0.25 * size / 4.8, shuffle="shards") == pytest.approx(0.3 * whole, rel=0.05)
    monkeypatch.setattr(sources, "MAX_TEXT_AT_ONCE", size / 2)
    assert needed() == needed(shuffle="shards"), "of very much text the order is that"
    build_token_cache(source, "train", tokenizer, cache)  # type: ignore[arg-type]
    assert needed(10**9) == 0
    require_cache_room(cache, 1)
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 2**29)
    with pytest.raises(UserError, match=r"take about 1,024\.0 MiB more, the disk has 512\.0 MiB(.|\n)*paths\.cache=…"):
        require_cache_room(cache, 2**30)


def test_a_stage_after_base_takes_what_auto_came_to_there(tmp_path: Path) -> None:
    """Typed for a whole pipeline, data=auto trained base for hours and was then refused by sft: auto is not the name of
    what the bundle was trained on."""
    from nanochat_pl.bundle.bundle import save_stage_info
    from nanochat_pl.bundle.stage_info import StageInfo
    from nanochat_pl.cli.train import compose_train
    from nanochat_pl.common.run_dir import StageFolder
    from nanochat_pl.common.schema import to_plain
    from nanochat_pl.data.sources.auto import with_choice, write_choice
    from nanochat_pl.training.stage_data.inherit import inherited

    config = compose_train(["stage=sft", "stage.parent=base", "data=auto", "data.download=false"]).config
    folder = StageFolder(tmp_path, "one", "sft", "one")
    base = folder.parent("base")
    for choice in ("docs", "web"):
        data = with_choice(config.data, choice)
        base.bundle.mkdir(parents=True, exist_ok=True)
        write_choice(base.chosen_source, data)
        settings = {"data": to_plain(data), "model": to_plain(config.model), "tokenizer": to_plain(config.tokenizer)}
        save_stage_info(base.bundle, StageInfo(stage="base", settings=settings))
        (base.path / "finished.json").write_text("{}", encoding="utf-8")
        assert inherited(config, folder, {"data.name", "data.download"}).data == data
