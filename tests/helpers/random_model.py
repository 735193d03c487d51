"""A small model that has learnt nothing: what it writes depends on all that it was given."""

from __future__ import annotations

import torch

from nanochat_pl.model.gpt import GPT
from tests.helpers.small_engine import SmallBundle, byte_tokenizer, small_config


@torch.no_grad()
def random_bundle(sequence_len: int = 32) -> SmallBundle:
    """One layer and a token a byte; its positions end at ten times ``sequence_len``."""
    net = GPT(small_config(sequence_len)).materialise().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.normal_(0.0, 1.0, generator=generator)
    return SmallBundle(net, byte_tokenizer())
