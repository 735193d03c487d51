"""Code that a model has written, run behind walls: see docs/sandbox.md."""

from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import Check, Outcome, Reason, SandboxSettings

__all__ = ["Check", "Outcome", "Reason", "Sandbox", "SandboxSettings"]
