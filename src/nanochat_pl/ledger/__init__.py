"""The ledger: a line of JSON for every time that a stage of any run began to train or ended, beside the runs."""

from nanochat_pl.ledger.entry import Entry
from nanochat_pl.ledger.file import LEDGER, append, newest, read_ledger

__all__ = ["LEDGER", "Entry", "append", "newest", "read_ledger"]
