"""What `nanochat-pl inspect` does once its settings are read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nanochat_pl.bundle.bundle import hash_of_weights, load_config, load_tokenizer, load_weights
from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.cli.run_record import settings_of
from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.device import choose_compute_dtype, choose_device, require_kernels
from nanochat_pl.common.device_settings import Accelerator
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import only_run
from nanochat_pl.common.run_dir import StageFolder, stage_folder
from nanochat_pl.common.schema import build
from nanochat_pl.engine import Engine
from nanochat_pl.model.gpt import GPT, TORCH_DTYPES
from nanochat_pl.training.callbacks.evaluation import ModelAndTokenizer
from nanochat_pl.training.checkpoint.io import AtomicCheckpointIO
from nanochat_pl.training.checkpoint.resume import resume_files, step_of
from nanochat_pl.training.rl.records import FOLDER, ranges_in_words, read_record, record_files
from nanochat_pl.training.rl.rollouts import sampling
from nanochat_pl.training.rl.settings import RLSettings

if TYPE_CHECKING:
    from nanochat_pl.cli.inspect import InspectConfig

MAX_TOKENS_SHOWN = 1000


class Weights(NamedTuple):
    """A file of weights, and how many steps of the stage they have made."""

    path: Path
    step: int


def inspect(config: InspectConfig, step: int, index: int) -> int:
    """Show an answer and write it again; gives the exit code.

    Args:
        config: settings of the command.
        step: number of the step, from 1.
        index: number of the answer in it, from 0.
    """
    runs = Path(config.paths.runs)
    folder = stage_folder(runs, config.run or only_run(runs), config.stage)
    line = read_record(folder.path, step, index)
    tokenizer = load_tokenizer(_parent(folder).bundle)
    _show(line, tokenizer, config.tokens)
    kept = _weights(folder)
    found = next((each for each in kept if each.step == line["written_at"]), None)
    if found is None:
        _say_which(folder, line, {each.step for each in kept})
        return 0
    return 0 if _same_again(folder, line, found, tokenizer, config.accelerator) else 1


def _show(line: dict[str, Any], tokenizer: Any, tokens: bool) -> None:
    rank_zero_print(f"Prompt ({line['task']}): {tokenizer.decode(line['prompt'])}")
    rank_zero_print(f"Answer: {tokenizer.decode(line['ids'])}")
    trained = "" if line["trained"] else ", left out of the loss"
    rank_zero_print(
        f"Step {line['step']:,}, answer {line['index']}: reward {line['reward']:g}, advantage {line['advantage']:g}"
        f"{trained}; {len(line['ids']):,} tokens, {sum(line['mask']):,} of them drawn, finish reason"
        f" {line['finish_reason']}, seed {line['seed']}; written by the weights after step {line['written_at']:,}."
    )
    ours = line.get("trained_logprobs", line["logprobs"])
    if line["trained"]:
        pairs = [pair for *pair, drawn in zip(ours, line["logprobs"], line["mask"], strict=True) if drawn]
        differences = [abs(a - b) for a, b in pairs if a is not None]
        if odd := len(pairs) - len(differences):
            rank_zero_print(f"The trainer's log-probs of {odd:,} of {len(pairs):,} drawn tokens were not finite.")
        moved = " (after other updates on this rollout)" if line["step"] - 1 > line["written_at"] else ""
        if differences:
            rank_zero_print(f"Largest difference of log-probs, sampler and trainer: {max(differences):.3g}{moved}.")
    if tokens:
        rows = zip(line["ids"], line["mask"], line["logprobs"], ours, strict=True)
        print_table(
            ("", "token", "text", "drawn", "log-prob", "trainer's"),
            [
                (i, token, repr(tokenizer.decode([token])), drawn, f"{theirs:.6f}", _number(own) if drawn else "")
                for i, (token, drawn, theirs, own) in enumerate(rows)
            ][:MAX_TOKENS_SHOWN],
        )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6f}"


def _parent(folder: StageFolder) -> StageFolder:
    name = settings_of(folder).get("stage", {}).get("parent")
    if not isinstance(name, str):
        raise UserError(f"{folder.path}: its config.yaml names no parent stage.", "Bring it back from a copy.")
    return folder.parent(name)


def _weights(folder: StageFolder) -> list[Weights]:
    """Weights of steps of the stage that are there: those it started from, of resume files, and those it ended with."""
    parent = _parent(folder)
    found = [Weights(parent.bundle, 0)] if parent.status == "finished" and _started_from(folder, parent) else []
    found += [Weights(path, step_of(path)) for path in resume_files(folder.checkpoints)]
    if folder.status == "finished":
        found.append(Weights(folder.bundle, int(folder.finished()["step"])))
    return found


def _started_from(folder: StageFolder, parent: StageFolder) -> bool:
    """Whether a stage started from the weights that its parent has now; says where it did not.

    A stage that is not finished has no record of them, and a run does not train its parent anew.
    """
    if folder.status != "finished":
        return True
    recorded = load_stage_info(folder.bundle).parents
    if not recorded or recorded[-1]["sha256"] == hash_of_weights(parent.bundle):
        return True
    rank_zero_print(f"{parent.bundle} has other weights now than those that {folder.path} started from (by SHA-256).")
    return False


def _say_which(folder: StageFolder, line: dict[str, Any], there: Collection[int]) -> None:
    updates = _settings(folder).updates_per_rollout
    steps = [step for step in record_files(folder.path / FOLDER) if (step - 1) // updates * updates in there]
    rank_zero_print(
        f"It cannot be written again: the weights after step {line['written_at']:,} are not kept. Those that wrote the"
        f" answers of the steps {ranges_in_words(steps) or '(none)'} are; a run that is begun with"
        " trainer.checkpoint_every_steps=1 and a larger trainer.keep_last keeps more."
    )


def _settings(folder: StageFolder) -> RLSettings:
    return build(RLSettings, settings_of(folder).get("rl", {}), f"{folder.path / 'config.yaml'}: rl")


def _same_again(
    folder: StageFolder, line: dict[str, Any], weights: Weights, tokenizer: Any, accelerator: Accelerator
) -> bool:
    """Write an answer again, say whether it is the same, bit for bit; whether its tokens are."""
    device = choose_device(accelerator, "accelerator")
    require_kernels(device)
    config = load_config(_parent(folder).bundle)
    asked = settings_of(folder).get("model", {}).get("compute_dtype", "auto")
    dtype = choose_compute_dtype(asked, device, config.compute_dtype)
    net = GPT(config, TORCH_DTYPES[dtype]).materialise(device)
    net.load_state_dict(_read(weights.path))
    engine = Engine(ModelAndTokenizer(net.eval(), tokenizer))
    settings = _settings(folder).for_rows(config.sequence_len)
    (result,) = engine.generate([line["prompt"]], seeds=[line["seed"]], **sampling(settings))
    rank_zero_print(f"Written again with {weights.path}, on {device.type} in {dtype}:")
    if result.ids != line["ids"]:
        pairs = zip(result.ids, line["ids"], strict=False)
        shorter = min(len(result.ids), len(line["ids"]))  # one may be the beginning of the other
        place = next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)
        rank_zero_print(f"other tokens, from token {place} on: {tokenizer.decode(result.ids)}")
        return False
    far = max(abs(a - b) for a, b in zip(result.logprobs, line["logprobs"], strict=True))
    bits = "bit-equal" if result.logprobs == line["logprobs"] else f"up to {far:.3g} apart"
    rank_zero_print(f"the same {len(result.ids):,} tokens; their log-probs are {bits}.")
    return True


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a bundle, or of a resume file."""
    if path.is_dir():
        return load_weights(path)
    state = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
    return {name.removeprefix("net."): tensor for name, tensor in state.items()}
