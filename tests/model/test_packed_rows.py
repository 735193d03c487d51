"""Rows of several documents that do not see each other: each is computed as if it stood alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.model import loss as loss_module
from nanochat_pl.model.attention import plain
from nanochat_pl.model.compiled import CompiledLoss
from nanochat_pl.model.config import ModelSettings, resolve_model, with_documents_of
from nanochat_pl.model.inference import InferenceGPT
from nanochat_pl.model.kv_cache import KVCache
from nanochat_pl.model.packed_rows import PackedRows
from tests.helpers.models import perturbed, random_ids, tiny_config

BOS = 41  # vocabulary of 50, of which nine are special
T = 64


def config(**changes):
    changes = {"document_start_id": BOS, "sequence_len": T, "rotary_reach": 10 * T, "windows": (3, 16, T), **changes}
    return tiny_config(**changes)


def documents(*lengths):
    """Documents of so many tokens, each with bos in front."""
    ids = random_ids(config(), 1, sum(lengths))[0] % BOS
    return [torch.cat([torch.tensor([BOS]), part[1:]]) for part in ids.split(list(lengths))]


# A row that begins in the middle of a document, and one that ends in padding.
ROWS = [torch.cat([each[1:] if number == 0 else each for number, each in enumerate(documents(20, 5, 2, 38))])]
ROWS += [torch.cat([*documents(30, 1 + 17), torch.full((16,), BOS)])]
IDS = torch.stack(ROWS)
PARTS = [(0, 0, 19), (0, 19, 24), (0, 24, 26), (0, 26, 64), (1, 0, 30), (1, 30, 48)]


@pytest.mark.parametrize("restart", [False, True], ids=["one line of positions", "positions begin again"])
@pytest.mark.parametrize("reach", [0, 1024], ids=["bands", "products"])
@pytest.mark.parametrize("kind", ["training", "inference"])
def test_a_document_in_a_row_is_computed_as_if_it_stood_alone(restart, reach, kind, monkeypatch):
    """Hidden states within 1e-5 in float32, relative to the largest: rotary positions are relative, up to rounding."""
    monkeypatch.setattr(plain, "PRODUCTS_REACH", reach)
    net = perturbed(config(restart_positions=restart))
    net = InferenceGPT(net) if kind == "inference" else net
    with torch.no_grad():
        packed = net.hidden(IDS)
        alone = [net.hidden(IDS[row, start:stop][None])[0] for row, start, stop in PARTS]
    for (row, start, stop), expected in zip(PARTS, alone, strict=True):
        assert (packed[row, start:stop] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("place", [18, 23, 25, 40])
def test_nothing_of_another_document_is_seen(place):
    """Bit by bit, in output and gradient: another token in one document changes nothing of the others."""
    net, changed = perturbed(config()), IDS.clone()
    changed[0, place] = (changed[0, place] + 1) % BOS
    (start, stop), others = next(
        ((start, stop), [part for part in PARTS if part != (row, start, stop)])
        for row, start, stop in PARTS
        if row == 0 and start <= place < stop
    )
    before, after = net.hidden(IDS), net.hidden(changed)
    assert not torch.equal(before[0, start:stop], after[0, start:stop])
    assert all(torch.equal(before[r, a:b], after[r, a:b]) for r, a, b in others)
    embedded = []
    monitored = net.transformer["wte"].register_forward_hook(lambda *call: embedded.append(call[2]))
    total = net.hidden(IDS)[0, start:stop].square().sum()
    monitored.remove()
    (gradient,) = torch.autograd.grad(total, embedded[0])
    assert gradient[0, start:stop].abs().amax(dim=-1).min() > 0
    assert gradient[0, :start].abs().sum() + gradient[0, stop:].abs().sum() + gradient[1].abs().sum() == 0


def test_without_the_mask_a_row_is_one_text():
    net = perturbed(config(document_start_id=None))
    changed = IDS.clone()
    changed[0, 0] = (changed[0, 0] + 1) % BOS
    assert net.packed(IDS) is None
    assert not torch.equal(net.hidden(IDS)[0, 19:], net.hidden(changed)[0, 19:])


def test_a_row_of_one_document_has_the_bits_of_a_model_without_the_mask_and_of_decoding():
    net, ids = perturbed(config(windows=(16, 32, T))), documents(T)[0][None]
    net.set_compute_dtype(torch.bfloat16)
    cache = KVCache(net.config, 1, T, dtype=torch.bfloat16)
    with torch.no_grad():
        whole = net(ids)
        cached = torch.cat([net(part, cache) for part in ids.split([20, 1, 1, T - 22], dim=1)], dim=1)
        net.config = dataclasses.replace(net.config, document_start_id=None)
        assert torch.equal(net(ids), whole)
        assert torch.equal(torch.cat([net(ids, KVCache(net.config, 1, T, dtype=torch.bfloat16))]), whole)
    assert torch.equal(cached, whole)


def test_where_documents_begin():
    packed = PackedRows(IDS, config(restart_positions=True))
    numbers = packed.documents.numbers
    assert numbers[0].tolist() == [0] * 19 + [1] * 5 + [2] * 2 + [3] * 38
    assert numbers[1].tolist() == [1] * 30 + [2] * 18 + [3] * 16
    assert packed.positions[0].tolist() == [*range(19), *range(5), *range(2), *range(38)]
    assert PackedRows(IDS, config()).positions == slice(T)


class CountingBackend:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


def test_compiled_it_has_the_bits_of_eager_and_other_cuts_compile_nothing(monkeypatch):
    backend, compile_ = CountingBackend(), torch.compile
    monkeypatch.setattr(loss_module, "tanh_of", torch.tanh)  # that of compiled graphs has other last bits
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, **options, backend=backend, fullgraph=True)
    )
    torch.compiler.reset()
    net = perturbed(config(depth=2, windows=(16, T), value_embedding_layers=(0, 1), restart_positions=True))
    net.activation_checkpointing = True
    compiled, results, graphs = CompiledLoss(net), {}, []
    for ids in (IDS, IDS.flip(0).roll(7, dims=1)):
        for name, function in (("compiled", compiled), ("eager", net.loss_by_row)):
            net.zero_grad(set_to_none=True)
            loss, by_row = function(ids, ids.roll(-1, dims=1))
            loss.backward()
            results[name] = [loss.detach(), by_row, *(parameter.grad for parameter in net.parameters())]
        graphs.append(backend.graphs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results.values(), strict=True))
    assert graphs[0] == graphs[1], "other documents are other values, not other shapes"
    torch.compiler.reset()


def test_settings_become_the_id_of_bos_and_each_stage_may_choose_anew():
    plain, masked = (resolve_model(ModelSettings(depth=1, document_mask=on), 50, "float32") for on in (False, True))
    assert (plain.document_start_id, masked.document_start_id) == (None, BOS)
    again = ModelSettings(depth=1, document_mask=True, restart_positions=True)
    assert with_documents_of(again, plain) == dataclasses.replace(masked, restart_positions=True)
    assert with_documents_of(ModelSettings(depth=1), masked) == plain


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ModelSettings(restart_positions=True), "needs document_mask=true"),
        (lambda: config(document_start_id=None, restart_positions=True), "needs a document_start_id"),
        (lambda: config(document_start_id=50), "must be below vocab_size=50"),
    ],
)
def test_what_does_not_go_together_is_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()
