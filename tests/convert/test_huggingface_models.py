"""What transformers computes with exported models: logits, loss, greedy text, with and without a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nanochat_pl.bundle.bundle import Bundle
from nanochat_pl.convert.huggingface.config import is_native
from nanochat_pl.convert.huggingface.read import read_huggingface
from nanochat_pl.engine import Engine
from nanochat_pl.model.gpt import GPT
from tests.helpers.exports import GENERATIONS, make_bundle, prompts, transformers_at, write


@dataclass(frozen=True)
class Exported:
    """A bundle, its network with the rotary tables that transformers can have, and what transformers made of it."""

    bundle: Bundle
    net: GPT
    folder: Path
    model: Any
    transformers: ModuleType

    def load(self, **options: Any) -> Any:
        load = self.transformers.AutoModelForCausalLM.from_pretrained
        return load(self.folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with transformers_at(tmp_path_factory.mktemp("modules")) as module:
        yield module


@pytest.fixture(scope="module", params=GENERATIONS)
def exported(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory, transformers: ModuleType
) -> Exported:
    here = tmp_path_factory.mktemp(request.param)
    bundle = make_bundle(golden, here / "bundle", request.param)
    # Those of transformers' own model are never rounded; the code that travels rounds them as the config says.
    rounded = bundle.config.rotary_bfloat16 and not is_native(bundle.config)
    net = GPT(replace(bundle.config, rotary_bfloat16=rounded)).materialise()
    net.load_state_dict(bundle.net.state_dict())
    folder = write(bundle, here / "hf")
    made = Exported(bundle, net.eval(), folder, None, transformers)
    return replace(made, model=made.load())


def ids_of(exported: Exported, rows: int = 2, length: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(exported.bundle.config.vocab_size, (rows, length), generator=generator)


def generate(exported: Exported, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """64 more tokens, greedily, whatever they are: int64 (B, 64)."""
    options = {
        "max_new_tokens": 64,
        "min_new_tokens": 64,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    } | options
    exported.model.generation_config.eos_token_id = None
    return exported.model.generate(ids, **options)[:, ids.size(1) :]


def test_each_generation_is_the_model_that_it_should_be(exported: Exported) -> None:
    name = type(exported.model).__name__
    assert name == ("NanoChatForCausalLM" if is_native(exported.bundle.config) else "NanoChatPLForCausalLM")
    assert next(exported.model.parameters()).dtype == torch.float32
    stops = exported.bundle.tokenizer
    assert stops is not None
    loaded = exported.load().generation_config
    assert loaded.eos_token_id == [stops.special_ids["<|assistant_end|>"], stops.bos_id]


@torch.no_grad()
def test_logits_in_float32(exported: Exported) -> None:
    """Measured: 1.0e-6 … 2.2e-6."""
    ids = ids_of(exported)
    torch.testing.assert_close(exported.model(ids).logits, exported.net(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_in_bfloat16(exported: Exported) -> None:
    """Its roundings are no larger than ours. Measured: means of 4.99e-3 … 5.73e-3, ours 4.99e-3 … 5.78e-3."""
    ids = ids_of(exported)
    model = exported.load(dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    ours = GPT(exported.net.config, torch.bfloat16).materialise()
    ours.load_state_dict(exported.net.state_dict())
    expected, precise, found = ours(ids), exported.net(ids), model(ids).logits.float()
    own_error = (expected - precise).abs().mean()
    assert (found - precise).abs().mean() < 1.2 * own_error
    assert (found - expected).abs().mean() < 1.5 * own_error
    if exported.net.config.residual_lambdas:
        assert model.resid_lambdas.dtype == torch.float32


@torch.no_grad()
def test_loss_is_ours(exported: Exported) -> None:
    """transformers shifts the labels itself and leaves -100 out."""
    ids = ids_of(exported)
    labels = ids.clone()
    labels[:, 50:60] = -100
    targets = torch.where(labels[:, 1:] == -100, -1, labels[:, 1:])
    expected = exported.net.losses(ids[:, :-1], targets).sum() / (targets >= 0).sum()
    torch.testing.assert_close(exported.model(ids, labels=labels).loss, expected, atol=1e-5, rtol=0)


def test_trains_after_inference(exported: Exported) -> None:
    """Tables that were made under inference_mode could not be used by a backward."""
    model, ids = exported.load(), ids_of(exported, 1, 10)
    with torch.inference_mode():
        model(ids)
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_greedy_text_is_that_of_our_engine(exported: Exported) -> None:
    tokenizer = exported.bundle.tokenizer
    assert tokenizer is not None
    ours = Engine(replace(exported.bundle, net=exported.net))
    for prompt, result in zip(
        prompts(tokenizer), ours.generate(prompts(tokenizer), max_tokens=64, stop_ids=[], tools=False), strict=True
    ):
        assert len(result.ids) == 64
        for use_cache in (True, False):
            found = generate(exported, torch.tensor([prompt]), use_cache=use_cache)
            assert found[0].tolist() == result.ids


def test_prompts_of_different_lengths_in_a_batch(exported: Exported) -> None:
    """Padded on the left, as transformers does for generation."""
    tokenizer = exported.bundle.tokenizer
    assert tokenizer is not None
    short, long = prompts(tokenizer)
    padding = len(long) - len(short)
    ids = torch.tensor([[tokenizer.bos_id] * padding + short, long])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    together = generate(exported, ids, attention_mask=mask)
    for row, prompt in zip(together, (short, long), strict=True):
        assert row.tolist() == generate(exported, torch.tensor([prompt]))[0].tolist()


@torch.no_grad()
def test_padding_on_either_side_leaves_the_logits_alone(exported: Exported) -> None:
    ids = ids_of(exported, 1, 150)
    alone = exported.model(ids).logits
    padding = torch.full((1, 30), 5)
    for padded, mask, real in (
        (torch.cat([padding, ids], dim=1), [0] * 30 + [1] * 150, slice(30, None)),
        (torch.cat([ids, padding], dim=1), [1] * 150 + [0] * 30, slice(150)),
    ):
        mask_tensor = torch.tensor([mask])
        # As generate gives them; transformers' own model would not count them itself.
        positions = (mask_tensor.cumsum(-1) - 1).clamp(min=0)
        given = {} if not is_native(exported.bundle.config) else {"position_ids": positions}
        logits = exported.model(padded, attention_mask=mask_tensor, **given).logits
        torch.testing.assert_close(logits[:, real], alone, atol=1e-5, rtol=0)


def test_beams_take_the_cache_along(exported: Exported) -> None:
    ids = torch.tensor([prompts(exported.bundle.tokenizer)[0]])  # type: ignore[arg-type]
    with_cache, without = (
        generate(exported, ids, num_beams=3, max_new_tokens=16, min_new_tokens=16, use_cache=use)
        for use in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


@torch.no_grad()
def test_a_prompt_in_pieces(exported: Exported) -> None:
    ids = ids_of(exported)
    whole = exported.model(ids, use_cache=False).logits
    cache, pieces = None, []
    for piece in ids.split([150, 1, 49], dim=1):
        output = exported.model(piece, past_key_values=cache, use_cache=True)
        cache, pieces = output.past_key_values, [*pieces, output.logits]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)


def test_saved_again_by_transformers_in_several_files(exported: Exported, tmp_path: Path) -> None:
    """As after a fine-tuning: what transformers saves is loaded and imported, too."""
    exported.load().save_pretrained(tmp_path / "again", max_shard_size="400KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = replace(exported, folder=tmp_path / "again").load()
    ids = ids_of(exported, 1, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, exported.model(ids).logits)
    imported = read_huggingface(tmp_path / "again")
    assert imported.config == exported.bundle.config and imported.tokenizer is None
    for name, weight in exported.bundle.net.state_dict().items():
        assert torch.equal(imported.weights[name], weight), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "reads input_ids"),
        ({"input_ids": torch.zeros(1, 5121, dtype=torch.int64)}, "rotary tables end at 5120"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 1, 4, 4)}, "4 dimensions"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 3)}, "there are 4"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "output_attentions": True}, "not supported"),
    ],
)
def test_what_the_code_that_travels_refuses(
    golden: Path, tmp_path: Path, transformers: ModuleType, changes: dict[str, Any], message: str
) -> None:
    bundle = make_bundle(golden, tmp_path / "bundle", "2026", with_tokenizer=False)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(write(bundle, tmp_path / "hf"), trust_remote_code=True)
    with pytest.raises(ValueError, match=message):
        model(**changes)
    with pytest.raises(ValueError, match="DynamicCache only"):
        model.generate(torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=2, cache_implementation="static")
