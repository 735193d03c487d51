"""Spelling in one wording, many times over: what a model learns first of the letters in its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.spelling import Spelling
from nanochat_pl.tasks.synthetic.words import WordSettings


@dataclass(frozen=True)
class SimpleSpellingSettings(WordSettings):
    """``Spell the word: apple``, in this wording alone; words of the corpus or of a list."""

    size: int | None = setting(200_000, "Training conversations; null: one for each word.", at_least=1)


@task("simple_spelling", SimpleSpellingSettings)
class SimpleSpelling(Spelling):
    """``Spell the word: apple`` → ``apple:a,p,p,l,e``. An answer is right if it is just this."""

    key = "simple_spelling"
    plain_share = 1.0
