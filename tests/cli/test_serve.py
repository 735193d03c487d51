"""The command `serve`, as far as it goes before a server starts."""

from __future__ import annotations

import pytest

from nanochat_pl.cli.main import main


def test_a_key_that_is_too_short_is_named_by_its_place_and_not_shown(here, monkeypatch, capsys) -> None:
    monkeypatch.setenv("NANOCHAT_PL_API_KEY", "secret1")
    (here / "keys.txt").write_text("long-enough-1\n\n# short\n", encoding="utf-8")
    assert main(["serve", "run=demo", "api_key_file=keys.txt"]) == 2
    said = capsys.readouterr().err
    assert "NANOCHAT_PL_API_KEY: the API key has fewer than 8 characters." in said
    assert "api_key_file=keys.txt, line 3: the API key has fewer than 8 characters." in said
    assert "secret1" not in said and "# short" not in said


@pytest.mark.parametrize(("text", "said"), [("", "has no key in it"), (None, "cannot be read")])
def test_a_file_without_keys_is_an_error(here, capsys, text, said) -> None:
    if text is not None:
        (here / "keys.txt").write_text(text, encoding="utf-8")
    assert main(["serve", "run=demo", "api_key_file=keys.txt"]) == 2
    assert f"api_key_file=keys.txt: {said}" in capsys.readouterr().err
