"""Looking inside a model and at its tokens: what the notebooks compute and draw."""

from nanochat_pl.inspection.drawing import draw_attention, draw_tokens, logprob_colors
from nanochat_pl.inspection.parameters import (
    ParameterSummary,
    Spectrum,
    layer_factors,
    nearest_tokens,
    parameter_summaries,
    spectra,
)
from nanochat_pl.inspection.tokens import ScoredToken, score_tokens, scored_result, show_token
from nanochat_pl.inspection.trace import Trace, logit_lens, trace

__all__ = [
    "ParameterSummary",
    "ScoredToken",
    "Spectrum",
    "Trace",
    "draw_attention",
    "draw_tokens",
    "layer_factors",
    "logit_lens",
    "logprob_colors",
    "nearest_tokens",
    "parameter_summaries",
    "score_tokens",
    "scored_result",
    "show_token",
    "spectra",
    "trace",
]
