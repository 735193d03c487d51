"""Silences the few messages of the libraries that say nothing to a person at the command line, each by name."""

from __future__ import annotations

import logging
import os
import warnings

# Message (a regular expression, from its beginning) → why it is noise here.
NOISE = {
    r"The '\w+' does not have many workers": "rows come from a memory map: no workers are needed",
    r"The number of training batches \(\d+\) is smaller than the logging interval": "we log by our own interval",
    r"You defined a `validation_step` but have no `val_dataloader`": "validation is our own callback",
    r"`ModelCheckpoint\(monitor": "resume files are our own callback",
    r"Checkpoint directory .* exists and is not empty": "so it is after a stop",
    r"Starting from v1\.9\.0, `tensorboardX` has been removed": "tensorboard is a dependency",
    r"In the future `np\.": "said inside of a library",
}


def quieten() -> None:
    """Called before Lightning is imported; changes filters of this process only."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    # "GPU available: …", "💡 Tip: …": what matters of it is in the line that names device and precision.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
