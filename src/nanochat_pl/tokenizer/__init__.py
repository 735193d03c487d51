"""Text to token ids and back, conversations to ids with a training mask."""

from nanochat_pl.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanochat_pl.tokenizer.training import TokenizerSettings, train_tokenizer

__all__ = ["SPECIAL_TOKENS", "SPLIT_PATTERN", "Tokenizer", "TokenizerSettings", "train_tokenizer"]
