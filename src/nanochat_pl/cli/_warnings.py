"""Silences the few messages of the libraries that say nothing to a person at the command line, each by name."""

from __future__ import annotations

import logging
import os
import warnings

# Message (a regular expression, from its beginning) → why it is noise here.
NOISE = {
    r"The `srun` command is available": "who starts the processes is known",
    r"The '\w+' does not have many workers": "rows come from a memory map: no workers are needed",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "between Lightning and torch",
}

# Loggers whose notes (not their warnings) are noise: "GPU available: …", tips, "`Trainer.fit` stopped", how a file is
# loaded. What matters of them is in our own lines. These and not their parents, whose level Lightning sets at import.
QUIET_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)


def quieten() -> None:
    """Called before Lightning is imported; changes filters of this process only."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
