"""A mixture in sequence: what the tasks' order becomes in rows and steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.data.packing.packer import pack
from nanochat_pl.data.packing.rows import Rows
from nanochat_pl.training.stage_data.conversations import PADDED_BUFFER
from tests.training.conftest import sft_overrides, start_run
from tests.training.test_mid import prepared_of


def test_a_mixture_in_sequence_is_trained_on_in_its_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the packer's own shuffle the tasks would lie evenly mixed, whatever the mixture says."""
    start_run(place, "sequence", "sft")
    arguments = [text for text in sft_overrides(place) if not text.startswith("max_steps")]
    own = ["run=sequence", "mixture.sequence=[identity,arithmetic]", "mixture.tasks.arithmetic.size=400"]
    prepared, mixture = prepared_of(place, [*arguments, *own, "stage.num_epochs=2"])
    rows = prepared.rows
    assert isinstance(rows, Rows)
    assert "In sequence: identity, arithmetic." in capsys.readouterr().out
    half = int(rows.index.epoch_starts[1])  # type: ignore[union-attr]
    for epoch in (range(half), range(half, len(rows))):
        names = [mixture.place(piece.document)[0] for row in epoch for piece in rows.address(row)]
        begin = names.index("arithmetic")
        assert begin > 100 and names[begin:].count("arithmetic") > 200
        # What still waits in the packer's buffer comes later.
        assert names[begin:].count("identity") <= PADDED_BUFFER
    assert main(["train", *arguments, *own, "max_steps=1"]) == 0
    assert "In sequence: identity; not reached: arithmetic." in capsys.readouterr().out


def test_the_packer_keeps_an_order() -> None:
    """A buffer of one leaves no choice: rows are filled in the order of arrival."""
    lengths = np.random.RandomState(0).randint(1, 20, 200)
    options = {"buffer_documents": 1, "refill_documents": 1, "shuffle": "none"}
    index = pack(lengths, 33, "pad", epochs=2, **options)  # type: ignore[arg-type]
    documents = index.pieces_of(np.arange(index.num_rows))[1][:, 0]
    assert documents.tolist() == [*range(200), *range(200)]
