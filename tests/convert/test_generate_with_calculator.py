"""The calculator of an exported model: the loop that travels with it writes what our engine writes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat_pl.bundle.bundle import Bundle, load_bundle, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo
from nanochat_pl.convert.huggingface.remote_code import generate_with_calculator
from nanochat_pl.convert.huggingface.write import CALCULATING
from nanochat_pl.engine import Engine
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.init import init_weights
from nanochat_pl.tools import calculator
from tests.helpers.exports import config_of, tokenizer_of, transformers_at, write

QUESTION = {"role": "user", "content": "What is 12 + 7?"}
# In the training its result is never a target: whoever does not run the tool cannot know it.
PARTS = [{"type": "python", "text": "12+7"}, {"type": "python_output", "text": "19"}, {"type": "text", "text": "= 19."}]


def taught(golden: Path, folder: Path, generation: str) -> Bundle:
    """A bundle that has learnt one conversation by heart."""
    config = config_of(generation)
    tokenizer = tokenizer_of(golden, config.vocab_size)
    net = init_weights(GPT(config).materialise(), seed=0)
    ids, mask = tokenizer.render_conversation({"messages": [QUESTION, {"role": "assistant", "content": PARTS}]})
    row = torch.tensor([ids])
    targets = torch.where(torch.tensor([mask[1:]]).bool(), row[:, 1:], -100)
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-3)
    for _ in range(100):
        loss = F.cross_entropy(net(row[:, :-1]).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    stage = StageInfo(stage="sft", step=100)
    return load_bundle(save_bundle(folder, stage, net=net, tokenizer=tokenizer), dtype="float32")


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with transformers_at(tmp_path_factory.mktemp("modules")) as module:
        yield module


@pytest.mark.parametrize("generation", [pytest.param("2025_10", marks=pytest.mark.slow), "2026"])
def test_a_sum_is_answered_as_the_engine_answers_it(
    golden: Path, tmp_path: Path, transformers: ModuleType, generation: str
) -> None:
    bundle = taught(golden, tmp_path / "bundle", generation)
    assert bundle.tokenizer is not None
    ours = Engine(bundle).generate([bundle.tokenizer.render_for_completion({"messages": [QUESTION]})])[0]
    assert ours.text == "= 19." and any(ours.forced)
    folder = write(bundle, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    shipped = run_path(str(folder / CALCULATING))
    answer = shipped["generate_with_calculator"](model, tokenizer, [QUESTION], do_sample=False)
    assert answer == ours.ids
    assert shipped["visible_text"](tokenizer, answer) == "= 19."
    for few in range(1, len(answer)):
        some = shipped["generate_with_calculator"](model, tokenizer, [QUESTION], few, do_sample=False)
        assert some == answer[:few]
    # What transformers alone writes has no result of ours in it.
    inputs = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    alone = model.generate(**inputs, max_new_tokens=len(answer), do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert alone.tolist() != answer


class Scripted:
    """A model that writes what it is told to, and a tokenizer of characters and special tokens."""

    SPECIAL = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>")

    def __init__(self, script: str) -> None:
        self.script, self.device = self.encode(script), torch.device("cpu")
        self.generation_config = type("Config", (), {"eos_token_id": [4]})()

    def encode(self, text: str, **options: Any) -> list[int]:
        for number, name in enumerate(self.SPECIAL):
            text = text.replace(name, chr(number))
        return [ord(sign) for sign in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(name for name in self.convert_ids_to_tokens(ids) if not skip_special_tokens or len(name) == 1)

    def convert_tokens_to_ids(self, names: list[str]) -> list[int]:
        return [self.SPECIAL.index(name) for name in names]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.SPECIAL[number] if number < 5 else chr(number) for number in ids]

    def apply_chat_template(self, messages: list[Any], **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[63]])}

    def generate(self, ids: torch.Tensor, max_new_tokens: int, eos_token_id: list[int], **options: Any) -> torch.Tensor:
        new: list[int] = []
        while self.script and len(new) < max_new_tokens and (not new or new[-1] not in eos_token_id):
            new.append(self.script.pop(0))
        return torch.cat([ids, torch.tensor([new])], dim=1)


@pytest.mark.parametrize(
    ("script", "answer", "visible"),
    [
        (
            "So <|python_start|>2*3<|python_end|>6, <|python_start|>1/0<|python_end|>oh<|assistant_end|>",
            "So <|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>6, <|python_start|>1/0<|python_end|>oh"
            "<|assistant_end|>",
            "So 6, oh",
        ),
        ("a<|python_end|>b<|assistant_end|>", "a<|python_end|>b<|assistant_end|>", "ab"),
        (
            "<|python_start|>1<|python_start|>2+2<|python_end|><|python_end|>.<|assistant_end|>",
            "<|python_start|>1<|python_start|>2+2<|python_end|><|output_start|>4<|output_end|><|python_end|>."
            "<|assistant_end|>",
            ".",
        ),
    ],
)
def test_what_is_no_sum_is_left_to_the_model(
    script: str, answer: str, visible: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file in (generate_with_calculator_path(), Path(calculator.__file__)):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shipped = run_path(str(tmp_path / CALCULATING))
    scripted = Scripted(script)
    found = shipped["generate_with_calculator"](scripted, scripted, [QUESTION])
    assert scripted.decode(found) == answer
    assert shipped["visible_text"](scripted, found) == visible


def generate_with_calculator_path() -> Path:
    return Path(generate_with_calculator.__file__)


@pytest.mark.slow
def test_the_program_answers_in_a_process_of_its_own(golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = write(taught(golden, tmp_path / "bundle", "2026"), tmp_path / "hf")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(folder / CALCULATING), *QUESTION["content"].split()],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout == "= 19.\n"


def test_what_travels_needs_torch_and_transformers_alone() -> None:
    for path in (generate_with_calculator_path(), Path(calculator.__file__)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {name.split(".")[0] for name in names} - {"torch", "transformers"}:
                assert name in sys.stdlib_module_names, f"{path.name}: {name}"
