"""compile=auto: tried once, remembered, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_pl.common.errors import NotFiniteError
from nanochat_pl.engine import Engine, compile_choice
from nanochat_pl.engine.compile_choice import engine_for
from tests.helpers.models import perturbed, tiny_config
from tests.helpers.small_engine import SmallBundle, byte_tokenizer


@pytest.fixture
def bundle() -> SmallBundle:
    return SmallBundle(perturbed(tiny_config(vocab_size=265)).eval(), byte_tokenizer())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """What was measured; a compiled engine takes half the time for one row, and as long as an eager one for several."""
    calls = []

    def seconds(engine: Engine, prompts: list[list[int]]) -> float:
        calls.append((engine.is_compiled, len(prompts)))
        return 0.5 if engine.is_compiled and len(prompts) == 1 else 1.0

    monkeypatch.setattr(compile_choice, "_seconds", seconds)
    return calls


def test_it_is_measured_once_for_what_it_depends_on(
    bundle: SmallBundle, measured: list[tuple[bool, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = engine_for(bundle, None, "auto", 4, tmp_path)
    assert not engine.is_compiled, "several rows gain nothing"
    assert {*measured} == {(False, 1), (True, 1), (False, 4), (True, 4)}
    assert "The decode step is not compiled: compiled it is 2 times as fast for one prompt, 1 times for 4." in (
        capsys.readouterr().out
    )
    measured.clear()
    assert not engine_for(bundle, None, "auto", 4, tmp_path).is_compiled and not measured
    assert "Trying" not in capsys.readouterr().out
    engine_for(bundle, None, "auto", 5, tmp_path)
    assert measured, "of another number of rows nothing is known"


def test_what_is_remembered_decides_and_damage_is_measured_again(
    bundle: SmallBundle, measured: list[tuple[bool, int]], tmp_path: Path
) -> None:
    engine_for(bundle, None, "auto", 4, tmp_path)
    (file,) = (tmp_path / "decode").iterdir()
    file.write_text('{"times_as_fast": [1.5, 1.2]}')
    measured.clear()
    assert engine_for(bundle, None, "auto", 4, tmp_path).is_compiled and not measured
    for damaged in ("{", "[]", "{}", '{"times_as_fast": 3}', '{"times_as_fast": ["x", 2]}', '{"times_as_fast": [2]}'):
        file.write_text(damaged)
        measured.clear()
        assert not engine_for(bundle, None, "auto", 4, tmp_path).is_compiled and measured, damaged


def test_what_was_asked_for_is_not_tried(bundle: SmallBundle, measured: list[tuple[bool, int]], tmp_path: Path) -> None:
    assert engine_for(bundle, None, True, 4, tmp_path).is_compiled
    assert not engine_for(bundle, None, False, 4, tmp_path).is_compiled
    assert not engine_for(bundle, "int8", "auto", 4, tmp_path).is_compiled
    bundle.net.set_compute_dtype(torch.bfloat16)
    assert not engine_for(bundle, None, "auto", 4, tmp_path).is_compiled, "it would not keep bits"
    assert not measured and not [*tmp_path.iterdir()]


def test_without_a_compiler_it_is_eager_and_tried_again_next_time(
    bundle: SmallBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile(function: Any, **_: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("No working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    engine = engine_for(bundle, None, "auto", 4, tmp_path)
    assert not engine.is_compiled and len(engine.generate([[1, 2]], max_tokens=3, stop_ids=())[0].ids) == 3
    assert "The decode step is not compiled: torch.compile does not run here: No working C++" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_a_model_that_gives_no_numbers_is_the_error_that_it_is(bundle: SmallBundle, tmp_path: Path) -> None:
    with torch.no_grad():
        bundle.net.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        engine_for(bundle, None, "auto", 4, tmp_path)
    assert not [*tmp_path.iterdir()]
