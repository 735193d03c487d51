"""What the bands are worth: each mistake in precision or arithmetic is noticed, and by what.

``python -m tests.fidelity.mistakes`` looks for each mistake in every way, and shows what nothing notices.
"""

from __future__ import annotations

import pytest

from tests.fidelity.metrics import WAYS, warm_up
from tests.fidelity.mistakes import ANY_DTYPE, LOW_PRECISION
from tests.fidelity.setting import SEEDS

# The cheapest way that notices it.
NOTICED = {
    "softcap and cross entropy in bfloat16": "gradients",
    "the loss summed in bfloat16": "first losses",
    "RMSNorm in bfloat16": "gradients of five seeds",
    "rotary angles in bfloat16": "gradients",
    "embeddings kept in bfloat16": "gradients of five seeds",
    "attention's scale × 1.05 in bfloat16": "gradients",
    "attention's scale × 1.01 in bfloat16": "gradients of five seeds",
    "gradient of the matrices × 1.05 in bfloat16": "gradients",
    "gradient of lm_head × 1.05 in bfloat16": "gradients",
    "Muon's norms in bfloat16": "updates",
    "Muon in float32 where the model computes in bfloat16": "updates",
    "weights kept in bfloat16": "updates",
    "AdamW's first moment kept in bfloat16": "updates",
    "AdamW's second moment kept in bfloat16": "updates",
    "attention's scale × 1.05": "float32 losses",
    "a window off by one": "float32 losses",
    "gradient of the matrices × 1.05": "float32 gradients",
    "Muon in bfloat16 where the model computes in float32": "updates",
    "the schedule a step late": "float32 losses",
}
# These change less than another draw of the roundings does. (Attention's shares are rounded before they meet the values
# anyway; two micro-batches are one sum; Muon's products in bfloat16 are rougher than its moments would be.)
NOT_NOTICED = {
    "attention's softmax in bfloat16",
    "micro-batches' gradients summed in bfloat16",
    "Muon's momentum kept in bfloat16",
    "Muon's second moment kept in bfloat16",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "five" in way or "bfloat16" in name else ())
        for name, way in NOTICED.items()
    ],
)
def test_a_mistake_is_noticed(name: str) -> None:
    warm_up(SEEDS if "five" in NOTICED[name] else [0])
    look = WAYS[NOTICED[name]]
    with (LOW_PRECISION | ANY_DTYPE)[name]():
        assert look()


def test_every_mistake_is_in_the_table() -> None:
    assert NOTICED.keys() | NOT_NOTICED == LOW_PRECISION.keys() | ANY_DTYPE.keys()


def test_without_a_mistake_nothing_is_noticed() -> None:
    """test_losses.py asks the other ways."""
    assert not WAYS["float32 gradients"]()
