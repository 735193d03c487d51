"""How OpenMP's threads wait for each other. Nothing here imports torch: it reads these settings when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

# Rounds of a loop, some tens of microseconds: small operations follow each other faster.
SPIN_COUNT = 2000


def wait_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for the environment by which threads that wait spin for a moment, and then sleep.

    Spinning without end makes a training several times slower as soon as another program wants a core. Sleeping at once
    costs more than a small operation takes. GNU's OpenMP, which PyTorch has on Linux, knows the way between;
    others sleep. Empty where the environment says already how they wait.
    """
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPIN_COUNT)}
