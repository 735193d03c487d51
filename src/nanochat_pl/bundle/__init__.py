"""Bundles: what a stage hands on. Next stage, evaluation, chat, notebooks and export read bundles and nothing else."""
