"""From a file of one's own conversations to an answer: fine-tuning, evaluation and what is kept of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat_pl.cli.main import main
from nanochat_pl.training.stage_data import conversations as stage_conversations

TINY = [
    "model.depth=2",
    "model.aspect_ratio=16",
    "model.head_dim=16",
    "model.sequence_len=32",
    "tokenizer.vocab_size=280",
    "total_batch_tokens=128",
    "evaluation.num_rows=4",
    "evaluation.sample_tokens=2",
    "trainer.accelerator=cpu",
    "trainer.compile=false",
    "logger=[]",
    "run=tiny",
]
OWN = ["stage=sft", "mixture=own", "mixture.tasks.conversations.chats.path=chats.jsonl"]


def talk(question: str, answer: str) -> str:
    return json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base run."""
    folder = tmp_path_factory.mktemp("own")
    text = "\n\n".join(f"say {n}: number {n} is not {n + 1}, and one more word" for n in range(300))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = ["data=local", "data.path=text.txt", "data.txt_document_chars=80", "max_steps=2"]
        assert main(["train", *TINY, *data, "paths.cache=cache"]) == 0
    return folder


@pytest.fixture
def here(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(base)
    return base


def test_a_file_of_conversations_is_trained_on_and_not_judged(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_conversations, "FEW_STEPS", 1000)
    lines = [talk(f"say {n}", f"{n} {n}") for n in range(120)]
    lines[7] = talk("hm?", " ")
    (here / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main(["train", *TINY, *OWN, "paths.cache=cache", "stage.num_epochs=2"]) == 0
    said = capsys.readouterr().out
    assert "1 bad rows are left out (1 empty content; the first: chats.jsonl, line 8: messages[1].content" in said
    assert "2.00 epochs" in said and "padding" in said
    assert "raise mixture.tasks.conversations.chats.repeat or stage.num_epochs" in said
    stage = json.loads((here / "runs/tiny/sft/bundle/stage.json").read_text(encoding="utf-8"))
    data = stage["data"]
    assert data["files"]["chats"]["rows"] == 120 and data["files"]["chats"]["bad"] == {"empty content": 1}
    assert data["conversations"] + data["held_out_conversations"] == 119
    assert data["packing"]["pieces"] == 2 * data["conversations"], "each conversation twice, the last step not cut off"
    assert data["packing"]["epochs"] == 2 and 0 < data["padded_share"] < 1

    (here / "chats.jsonl").unlink()  # no file is needed to see that there is nothing to judge
    assert main(["evaluate", "run=tiny", "suites=[chat,samples]", "paths.cache=cache"]) == 0
    assert "chats: skipped" in capsys.readouterr().out
    results = json.loads((here / "runs/tiny/evaluation/sft/results.json").read_text(encoding="utf-8"))
    assert list(results["suites"]) == ["samples"], "nothing to judge gives no metrics"
    assert main(["report", "run=tiny"]) == 0

    assert main(["evaluate", "run=tiny", "paths.cache=cache"]) == 0
    said = capsys.readouterr().out
    bits = stage["metrics"]["val/bpb"]
    assert f"bits per byte of held-out conversations, at the end of stage sft: {bits:.4f} ±" in said


def test_too_many_bad_rows_stop_the_run_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [talk("a", "b"), talk("c", "d"), "{", talk("", "e"), '{"messages": [{"role": "narrator", "content": "f"}]}']
    (here / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    other = [*TINY[:-1], "run=other", f"paths.runs={here / 'others'}", *OWN, "paths.cache=cache"]
    (here / "others/other").mkdir(parents=True)
    (here / "others/other/base").symlink_to(here / "runs/tiny/base")
    assert main(["train", *other]) == 2
    shown = capsys.readouterr()
    for part in (
        "mixture.tasks.conversations.chats: 3 of 5 rows are bad, 60.00%; data.max_bad_fraction=0.01 allows 1.00%",
        "1 × invalid JSON",
        "chats.jsonl, line 3: is not valid JSON",
        "1 × empty content",
        "1 × unknown role",
        "chats.jsonl, line 5: messages[0].role='narrator'",
    ):
        assert part in shown.err, part
    assert not (here / "others/other/sft/plan.json").exists()


def test_wrong_keys_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["mixture.tasks.conversations.chats.pat=x", "mixture.tasks.conversations.arithmetic.path=x"]
    assert main(["train", *TINY, "stage=sft", "mixture=own", *wrong]) == 2
    assert "did you mean mixture.tasks.conversations.chats.path" in capsys.readouterr().err
    assert main(["train", *TINY, "stage=sft", "mixture=own", wrong[1]]) == 2
    assert "a task has that name" in capsys.readouterr().err
    assert main(["train", *TINY, "stage=sft", "mixture=own"]) == 2
    assert "conversations.NAME.path" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["mixture.tasks.conversations", "mixture.tasks.smoltalk"])
def test_help_shows_the_keys_of_a_set(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", key]) == 0
    assert "test_fraction=0.05" in capsys.readouterr().out
