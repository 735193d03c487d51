"""nanochat_pl: train your own small ChatGPT with PyTorch Lightning and Hydra.

The public surface is small and stable: ``load_bundle`` and ``Engine``; for a Trainer of one's own the LightningModule
and the data modules (docs/lightning.md). All are imported on first use: ``import nanochat_pl`` costs nothing.
"""

from importlib import import_module
from typing import Any

__all__ = [
    "Engine",
    "LMModule",
    "ModuleConfig",
    "RowsDataModule",
    "TextDataModule",
    "__version__",
    "load_bundle",
]
__version__ = "0.1.0"

_PUBLIC = {
    "load_bundle": "nanochat_pl.bundle.bundle",
    "Engine": "nanochat_pl.engine",
    "LMModule": "nanochat_pl.training.module",
    "ModuleConfig": "nanochat_pl.training.module",
    "RowsDataModule": "nanochat_pl.training.datamodule",
    "TextDataModule": "nanochat_pl.training.text_datamodule",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nanochat_pl' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
