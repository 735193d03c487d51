"""Exports: a bundle in a layout of others, proved equal in a fresh process before the folder appears."""

from __future__ import annotations

import shutil
from pathlib import Path

from nanochat_pl.bundle import Bundle, load_bundle
from nanochat_pl.common.files import disk_errors_explained, write_text
from nanochat_pl.formats.huggingface_config import is_native
from nanochat_pl.formats.huggingface_write import require_transformers, write_huggingface
from nanochat_pl.formats.imported import require_free
from nanochat_pl.formats.model_card import model_card
from nanochat_pl.formats.parity import Layout, Parity, measure

CARD = "README.md"


def load_for_export(bundle_folder: Path, to: Path, layout: Layout) -> Bundle:
    """The bundle, after everything was checked that can be checked before a byte is written.

    Raises:
        UserError: ``to`` is there already, transformers is missing, the bundle is damaged.
    """
    require_free(to)
    if layout == "hf":
        require_transformers()
    return load_bundle(bundle_folder, dtype="float32")


def export(bundle: Bundle, to: Path, layout: Layout) -> Parity:
    """Write a bundle in a layout of others; the folder appears once it was found equal, else not at all.

    Args:
        bundle: of :func:`load_for_export`.
        to: the folder to make.
        layout: ``hf`` for transformers, ``nanochat`` for the reference's base folder.

    Raises:
        UserError: the disk refuses, or what was written does not give the bundle's numbers.
    """
    growing = to.with_name(to.name + ".tmp")
    try:
        if layout == "hf":
            with disk_errors_explained(growing):
                growing.mkdir(parents=True)
            write_huggingface(bundle, growing)
        else:
            from nanochat_pl.formats.nanochat_write import write_nanochat

            write_nanochat(bundle.path, growing)
        parity = measure(bundle, growing, layout, unrounded=layout == "hf" and is_native(bundle.config))
        write_text(growing / CARD, model_card(bundle, layout, parity))
        with disk_errors_explained(to):
            if to.exists():
                to.rmdir()  # empty, as was checked
            growing.replace(to)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return parity
