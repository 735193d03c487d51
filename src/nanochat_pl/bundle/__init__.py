"""Bundles: what a stage hands on. Next stage, evaluation, chat, notebooks and export read bundles and nothing else."""

from nanochat_pl.bundle.bundle import Bundle, load_bundle, naming_weights, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo

__all__ = ["Bundle", "StageInfo", "load_bundle", "naming_weights", "save_bundle"]
