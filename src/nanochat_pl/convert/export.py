"""Exports: a bundle in a layout of others, proved equal in a fresh process before the folder appears."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.bundle.bundle import Bundle, load_bundle, require_model
from nanochat_pl.common.files import explain_disk_errors, write_text
from nanochat_pl.convert.huggingface.config import is_native
from nanochat_pl.convert.huggingface.model_card import model_card
from nanochat_pl.convert.huggingface.write import require_transformers, write_huggingface
from nanochat_pl.convert.nanochat.write import require_expressible, write_nanochat
from nanochat_pl.convert.output_dir import appears_whole, require_free
from nanochat_pl.convert.parity import Layout, Parity, measure

CARD = "README.md"


def load_for_export(bundle_folder: Path, to: Path, layout: Layout, moments: bool = True) -> Bundle:
    """The bundle, after everything was checked that can be checked before a byte is written.

    Raises:
        UserError: ``to`` is there already, transformers is missing, the bundle is damaged or has no model, the layout
            cannot express it.
    """
    require_free(to)
    require_model(bundle_folder)
    if layout == "hf":
        require_transformers()
    else:
        require_expressible(bundle_folder, moments)
    return load_bundle(bundle_folder, dtype="float32")


def export(bundle: Bundle, to: Path, layout: Layout, moments: bool = True) -> Parity:
    """Write a bundle in a layout of others; the folder appears once it was found equal, else not at all.

    Args:
        layout: ``hf`` for transformers, ``nanochat`` for the reference's base folder.
        moments: whether the latter gets the optimizer's moments, where there are any.

    Raises:
        UserError: the disk refuses, or what was written does not give the bundle's numbers.
    """
    with appears_whole(to) as growing:
        if layout == "hf":
            with explain_disk_errors(growing):
                growing.mkdir(parents=True)
            write_huggingface(bundle, growing)
        else:
            write_nanochat(bundle.path, growing, moments)
        parity = measure(bundle, growing, layout, unrounded=layout == "hf" and is_native(bundle.config))
        write_text(growing / CARD, model_card(bundle, layout, parity))
    return parity
