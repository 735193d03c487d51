"""Measures the bands and writes bands.json; with --plot also a picture of them.

python -m tests.fidelity.make_bands --plot /tmp/fidelity.png
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from nanochat_pl.common.files import write_text
from nanochat_pl.model.config import DType
from nanochat_pl.model.gpt import GPT
from tests.fidelity.bands import FILE, Metrics, bands_of, curve_metrics, gradient_metrics, half_width, update_metrics
from tests.fidelity.setting import NUM_STEPS, SEEDS, Loss, Training, gradients, model_config, updates

# Curves take seconds each, gradients and updates a fraction of one.
CURVE_SEEDS, GRADIENT_SEEDS = range(15), range(40)
HOWS: tuple[tuple[DType, str], ...] = (("bfloat16", "eager"), ("float32", "compiled"), ("bfloat16", "compiled"))


def compiled(dtype: DType) -> tuple[GPT, Loss]:
    """A network and its loss, compiled as a stage compiles it."""
    net = GPT(model_config(dtype)).materialise()
    return net, torch.compile(net.weighted_loss, dynamic=False)


def main(plot: Path | None) -> None:
    """Measure, print, write."""
    torch.use_deterministic_algorithms(True)
    exact = {seed: list(Training(seed, "float32").losses()) for seed in CURVE_SEEDS}
    exact_gradients = {seed: gradients(seed, "float32") for seed in GRADIENT_SEEDS}
    curves: dict[str, list[Metrics]] = {}
    by_role: dict[str, list[Metrics]] = {}
    for dtype, way in HOWS:
        net, loss = compiled(dtype) if way == "compiled" else (None, None)
        how = f"{dtype} {way}"
        curves[how] = [
            curve_metrics(list(Training(seed, dtype, net, loss).losses()), exact[seed]) for seed in CURVE_SEEDS
        ]
        by_role[how] = [
            gradient_metrics(gradients(seed, dtype, net, loss), one) for seed, one in exact_gradients.items()
        ]
    curves["bfloat16 optimizer"] = []
    by_role["bfloat16 optimizer"] = [
        update_metrics(updates(seed, "bfloat16"), updates(seed, "float32")) for seed in GRADIENT_SEEDS
    ]
    for kind, metrics in (("losses", curves), ("gradients", by_role)):
        worst = max(abs(one[name]) for one in metrics["float32 compiled"] for name in one if not _is_logarithm(name))
        print(f"float32, compiled against eager, {kind}: at most {worst:.1e}")
    content = {
        "made_by": "python -m tests.fidelity.make_bands",
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "float32_losses": {str(seed): exact[seed] for seed in SEEDS},
        "float32_gradient_norms": {
            str(seed): {role: part.norm().item() for role, part in exact_gradients[seed].by_role.items()}
            for seed in SEEDS
        },
        "bands": {how: bands_of(curves[how]) | bands_of(by_role[how]) for how in by_role if how != "float32 compiled"},
    }
    write_text(FILE, json.dumps(content, indent=1) + "\n")
    if plot is not None:
        draw(plot, curves, by_role)


def _is_logarithm(name: str) -> bool:
    return "cosine" in name or name == "token losses"


def draw(path: Path, curves: dict[str, list[Metrics]], by_role: dict[str, list[Metrics]]) -> None:
    """Differences to float32 in the bands: losses step by step, and gradients by role."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    for axis, how in zip(axes[0], ("bfloat16 eager", "bfloat16 compiled"), strict=True):
        _draw_curves(axis, how, curves[how])
    _draw_gradients(axes[1][0], ": 1 - cosine", by_role, "log10 (1 − cosine)")
    _draw_gradients(axes[1][1], ": norm", by_role, "norm of the gradient / that of float32 − 1")
    figure.savefig(path, dpi=110)
    print(path)


def _draw_curves(axis, how: str, metrics: list[Metrics]) -> None:  # type: ignore[no-untyped-def]
    bands = bands_of(metrics)
    names = [f"loss at step {step}" for step in range(NUM_STEPS)]
    centre = [1e3 * bands[name]["centre"] for name in names]
    width = [1e3 * half_width(bands[name], 1) for name in names]
    low, high = ([c + sign * s for c, s in zip(centre, width, strict=True)] for sign in (-1, 1))
    axis.fill_between(range(NUM_STEPS), low, high, color="0.88", label="band for one seed")
    for one in metrics:
        axis.plot(range(NUM_STEPS), [1e3 * one[name] for name in names], lw=0.9)
    axis.plot(range(NUM_STEPS), centre, "k--", lw=1.5, label="centre")
    axis.set(title=f"{how} − float32 eager, {len(metrics)} seeds", xlabel="step", ylabel="loss, thousandths of a nat")
    axis.legend(loc="lower left")


def _draw_gradients(axis, kind: str, measured: dict[str, list[Metrics]], label: str) -> None:  # type: ignore[no-untyped-def]
    names = [name for name in measured["bfloat16 eager"][0] if name.endswith(kind)]
    for shift, how in ((-0.12, "bfloat16 eager"), (0.12, "bfloat16 compiled")):
        for place, name in enumerate(names):
            values = [one[name] for one in measured[how]]
            colour = "C0" if shift < 0 else "C1"
            axis.plot(
                [place + shift] * len(values), values, "o", ms=4, alpha=0.5, color=colour, label=None if place else how
            )
    axis.set_xticks(
        range(len(names)), [name.removeprefix("gradient of ").removesuffix(kind) for name in names], rotation=20
    )
    axis.set(title=label)
    axis.legend()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="where to draw the bands to (PNG)")
    main(parser.parse_args().plot)
