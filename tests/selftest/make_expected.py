"""Makes the metrics that the self-test holds a machine against, with the plain model and optimizer of tests/reference.

python -m tests.selftest.make_expected
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

import nanochat_pl.selftest
from nanochat_pl.optim.schedules import schedule_values
from nanochat_pl.training import tiny_steps
from tests.reference.model import ReferenceModel
from tests.reference.optimizer import AdamW, Muon

FILE = Path(nanochat_pl.selftest.__file__).with_name("expected.json")
WIDTH_SCALE = math.sqrt(768 / 48)
# By the beginning of the name: learning rate, betas and weight decay of AdamW. All else are matrices.
RULES = {
    "lm_head": (0.008 * WIDTH_SCALE, (0.8, 0.96), 0.01),
    "transformer.wte": (0.3 * WIDTH_SCALE, (0.8, 0.995), 0.001),
    "value_embeds": (0.15 * WIDTH_SCALE, (0.8, 0.995), 0.01),
    "resid_lambdas": (0.005, (0.8, 0.95), 0.05),
    "x0_lambdas": (0.5, (0.96, 0.95), 0.0),
    "smear": (0.2, (0.8, 0.95), 0.0),
    "backout": (0.2, (0.8, 0.95), 0.0),
}


def losses_and_norms() -> dict[str, list[float]]:
    """Nats per target and norms of the gradient before each step, in float64, one row and one matrix at a time."""
    net = tiny_steps.tiny_net(torch.device("cpu"))
    weights = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    optimizers = {name: _optimizer(name, weight) for name, weight in weights.items()}
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in range(tiny_steps.NUM_STEPS):
        loss, gradients = _loss_and_gradients(net.config, weights)
        found["losses"].append(round(loss, 9))
        found["norms"].append(round(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())), 9))
        if step == tiny_steps.NUM_STEPS - 1:
            break
        values = schedule_values(tiny_steps.SCHEDULE, step, tiny_steps.NUM_STEPS)
        for name, (optimizer, lr) in optimizers.items():
            if isinstance(optimizer, Muon):
                decay = 0.28 * values.weight_decay_multiplier
                optimizer.step(gradients[name], lr * values.lr_multiplier, values.muon_momentum, decay)
            else:
                optimizer.step(gradients[name], lr * values.lr_multiplier)
    return found


def _optimizer(name: str, weight: torch.Tensor) -> tuple[Muon | AdamW, float]:
    for beginning, (lr, betas, decay) in RULES.items():
        if name.startswith(beginning):
            return AdamW(weight, betas, decay), lr
    return Muon(weight), 0.02


def _loss_and_gradients(config, weights):
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    total = torch.zeros((), dtype=torch.float64)
    inputs, targets = tiny_steps.rows()
    for ids, goals in zip(inputs.tolist(), targets.tolist(), strict=True):
        logits = ReferenceModel(config, leaves).logits(ids)
        total = total - logits.log_softmax(dim=-1)[torch.arange(len(goals)), goals].sum()
    loss = total / targets.numel()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, gradients, strict=True))


if __name__ == "__main__":
    FILE.write_text(json.dumps(losses_and_norms(), indent=2) + "\n", encoding="utf-8")
    print(FILE.read_text(encoding="utf-8"))
