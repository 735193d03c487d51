"""One bfloat16 model by four ways: as it is trained, as it is evaluated, as the engine writes, as others load it.

Ways that round alike must agree bit for bit. The others (a cache, other code) round elsewhere: each must be as near to
float32 as the training is.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_pl.bundle.bundle import Bundle, load_bundle, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.engine import Engine
from nanochat_pl.evaluation.validation import Validation
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from tests.fidelity.setting import NUM_STEPS, VOCAB_SIZE, Training, batches

SEED = 0
# Measured, of logits whose deviation is 0.41: the training's are 0.0023 (root mean square) from float32's, those of the
# other ways too (0.998 to 1.001 of it), and 0.0007 to 0.0012 from the training's, nowhere more than 0.0154: one
# rounding of a logit. So three roundings are too many, and two logits six apart must keep their order.
AS_NEAR = 1.05
APART = 0.8
MOST = 0.05


def tokenizer() -> Tokenizer:
    """Bytes, pairs of letters, and the special tokens: as many as the model has."""
    letters = string.ascii_lowercase + " ."
    pairs = [(first + second).encode() for first in letters for second in letters]
    tokens = [bytes([byte]) for byte in range(256)] + pairs[: VOCAB_SIZE - 256 - len(SPECIAL_TOKENS)]
    specials = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer.from_ranks({token: rank for rank, token in enumerate(tokens)}, SPLIT_PATTERN, specials)


@dataclass(frozen=True)
class LossMask:
    """A model after its training in bfloat16, its bundle, and the same weights in float32."""

    training: Training
    bundle: Bundle
    exact: GPT

    @property
    def net(self) -> GPT:
        return self.training.net


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LossMask:
    training = Training(SEED, "float32")  # the weights, which are float32, matter here, and not how they were trained
    list(training.losses())
    training.net.set_compute_dtype(torch.bfloat16)
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    save_bundle(folder, StageInfo(stage="base", step=NUM_STEPS), net=training.net, tokenizer=tokenizer())
    return LossMask(training, load_bundle(folder, dtype="bfloat16"), load_bundle(folder, dtype="float32").net)


@torch.no_grad()
def assert_as_good_as_trained(trained: LossMask, way: Callable[[Tensor], Tensor]) -> None:
    """Its logits are as near to float32's as the training's, near to these, and no clear choice of a token changes."""
    ids = batches(SEED)[NUM_STEPS].inputs
    exact, as_trained, other = trained.exact(ids), trained.net(ids), way(ids)
    assert other.shape == exact.shape
    rounding = root_mean_square(as_trained - exact)
    assert root_mean_square(other - exact) < AS_NEAR * rounding
    assert root_mean_square(other - as_trained) < APART * rounding
    assert (other - as_trained).abs().max() < MOST
    best, second = as_trained.topk(2).values.unbind(-1)
    clear = best - second > 2 * MOST
    assert clear.float().mean() > 0.5, "too little was compared"
    assert torch.equal(other.argmax(-1)[clear], as_trained.argmax(-1)[clear])


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_a_bundle_computes_in_bfloat16_what_was_trained_bit_for_bit(trained: LossMask) -> None:
    loaded, net = trained.bundle.net, trained.net
    assert loaded.compute_dtype == net.compute_dtype == torch.bfloat16
    for name, weight in net.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, loaded.state_dict()[name]), name
    inputs, targets = batches(SEED)[NUM_STEPS][:2]
    with torch.no_grad():
        assert torch.equal(loaded.losses(inputs, targets), net.losses(inputs, targets))
        assert torch.equal(loaded(inputs), net(inputs))


class FixedRows:
    """The rows of a batch, as evaluation reads them."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs.numpy(), targets.numpy()

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs[numbers], self.targets[numbers]


def test_evaluation_of_the_bundle_gives_the_loss_of_the_training(trained: LossMask) -> None:
    """The step sums nats where it makes the gradients, evaluation takes them token by token: other code, same bits."""
    inputs, targets, count = batches(SEED)[NUM_STEPS][:3]
    nats = torch.zeros(())
    for start in (0, 2):
        with torch.enable_grad():
            nats += trained.training.weighted_loss(inputs[start : start + 2], targets[start : start + 2]).detach()
    rows = FixedRows(inputs, targets)
    metrics = Validation.of_rows(rows, len(inputs), tokenizer(), 2).measure(trained.bundle.net)  # type: ignore[arg-type]
    trained.bundle.net.eval()
    assert metrics["val/loss"] == pytest.approx(nats.item() / count, rel=1e-6)
    with torch.no_grad():
        losses = torch.cat([trained.net.losses(inputs[at : at + 2], targets[at : at + 2]) for at in (0, 2)]).double()
    num_bytes = torch.as_tensor(np.asarray(tokenizer().token_bytes)[targets.numpy()])
    bits = losses[num_bytes > 0].sum().item() / math.log(2)
    assert metrics["val/bpb"] == pytest.approx(bits / num_bytes.sum().item(), rel=1e-9)


@pytest.mark.parametrize("chunks", [[256], [100, 1, 27, 128], [200, *[1] * 56]], ids=["whole", "chunks", "decoding"])
def test_the_cache_is_as_near_to_float32_as_the_training(trained: LossMask, chunks: list[int]) -> None:
    """Past the short window of 128, and where a chunk begins within it."""

    def way(ids: Tensor) -> Tensor:
        cache = KVCache(trained.bundle.config, len(ids), ids.size(1), dtype=torch.bfloat16)
        return torch.cat([trained.bundle.net(part, cache) for part in ids.split(chunks, dim=1)], dim=1)

    assert_as_good_as_trained(trained, way)


def test_log_probabilities_of_the_engine_are_the_losses_of_the_training(trained: LossMask) -> None:
    """Of prompts of different lengths, written at the same time."""
    ids = batches(SEED)[NUM_STEPS].inputs
    prompts = [ids[0, :130].tolist(), ids[1, :60].tolist(), ids[2, :9].tolist()]
    results = Engine(trained.bundle).generate(prompts, max_tokens=40, temperature=1.0, stop_ids=(), tools=False)
    for prompt, result in zip(prompts, results, strict=True):
        row = torch.tensor([prompt + result.ids])
        with torch.no_grad():
            losses = trained.net.losses(row[:, :-1], row[:, 1:])[0, len(prompt) - 1 :]
            exact = trained.exact.losses(row[:, :-1], row[:, 1:])[0, len(prompt) - 1 :]
        written = -torch.tensor(result.logprobs)
        assert (written - losses).abs().max() < MOST
        assert root_mean_square(written - exact) < 1.5 * root_mean_square(losses - exact)


def test_transformers_loads_the_export_in_bfloat16_as_near_to_float32(trained: LossMask, tmp_path: Path) -> None:
    from tests.helpers.exports import transformers_at, write

    folder = write(trained.bundle, tmp_path / "hf")
    with transformers_at(tmp_path / "modules") as transformers:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert_as_good_as_trained(trained, lambda ids: model(ids).logits.float())
