"""Silences the few messages of the libraries that say nothing to a person at the command line, each by name."""

from __future__ import annotations

import logging
import os
import warnings

# Message (a regular expression, from its beginning) → why it is noise here.
NOISE = {
    r"The '\w+' does not have many workers": "rows come from a memory map: no workers are needed",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "between Lightning and torch",
}


def quieten() -> None:
    """Called before Lightning is imported; changes filters of this process only."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    # Its notes ("GPU available: …", "💡 Tip: …", "`Trainer.fit` stopped") all go through this logger; what matters of
    # them is in our own lines. Set on this one because Lightning resets the level of its parents at import.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
