"""Mixtures: whose turn each row is, what is read, and what is refused."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.data.cache.tokens import build_token_cache
from nanochat_pl.data.packing.mixture import MAX_PERIOD, MixedRows, MixtureSchedule, whole_weights
from nanochat_pl.data.packing.rows import Rows, packed_rows
from nanochat_pl.data.sources.base import DataSettings, WeightedSource
from nanochat_pl.data.sources.mixture import MAX_READS, MixedSource
from nanochat_pl.data.sources.open import open_source
from nanochat_pl.evaluation.bits_per_byte import BitsPerByte, result_of, weighted_result
from nanochat_pl.evaluation.validation import validation_metrics
from tests.helpers.fake_data import BOS, ByteTokenizer, ListSource

T = 16


def random_weights(seed: int) -> list[float]:
    """Up to seven, alike or far apart."""
    random = np.random.RandomState(seed)
    many = random.rand(random.randint(1, 8)) ** random.choice([0.1, 1, 3])
    return [float(f"{weight + 0.002:.3g}") for weight in many]


@pytest.mark.parametrize("seed", range(60))
def test_after_any_number_of_rows_each_source_has_its_share_within_one_row(seed: int) -> None:
    turns = MixtureSchedule(random_weights(seed))
    sources, places = turns.of(np.arange(3_000))
    taken = np.cumsum(sources[:, None] == np.arange(len(turns.weights)), axis=0)
    owed = np.outer(np.arange(1, 3_001), turns.shares)
    assert np.abs(taken - owed).max() < 1
    for num_rows in (0, 1, 17, turns.period, turns.period + 1, 2_999):
        if num_rows <= 3_000:
            assert turns.counts(num_rows) == np.bincount(sources[:num_rows], minlength=len(turns.weights)).tolist()
    for source in range(len(turns.weights)):
        of_source = places[sources == source]
        assert of_source.tolist() == list(range(len(of_source))), "its rows are taken one after the other"


def test_any_row_is_found_at_once() -> None:
    turns = MixtureSchedule([0.7, 0.2, 0.1])
    far = 10**12 + np.arange(20)
    assert turns.period == 10
    assert turns.of(far)[0].tolist() == turns.of(np.arange(20))[0].tolist()
    assert turns.counts(10**12 + 1)[turns.of(far[:1])[0][0]] == turns.of(far[:1])[1][0] + 1


def test_weights_need_no_certain_sum() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == whole_weights([7, 2, 1]) == whole_weights([70.0, 20.0, 10.0]) == (7, 2, 1)
    assert whole_weights([5]) == (1,) and whole_weights([3, 3]) == (1, 1)
    assert whole_weights([1e-5, 0.99999]) == (1, 99_999)
    rounded = whole_weights([1.23456789, 2.3456789e-5, 7.1])
    assert sum(rounded) == MAX_PERIOD and min(rounded) == 1
    # Of equal sources the first comes first.
    assert MixtureSchedule([2, 1, 1]).of(np.arange(8))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 2]


def rows_of(name: str, cache_dir: Path, num_rows: int) -> Rows:
    random = np.random.RandomState(ord(name))
    texts = [name * random.randint(1, 3 * T) for _ in range(30)]
    cache = build_token_cache(ListSource({f"{name}.txt": texts}), "train", ByteTokenizer(), cache_dir)
    return packed_rows(cache, T, BOS, "split", cache_dir, num_rows=num_rows)


@pytest.fixture
def mixed(tmp_path: Path) -> MixedRows:
    turns = MixtureSchedule([3, 1, 6])
    counts = zip("abc", turns.counts(47), strict=True)
    return MixedRows({name: rows_of(name, tmp_path, count) for name, count in counts}, turns, 47)


def test_every_row_is_the_next_one_of_its_source(mixed: MixedRows) -> None:
    inputs, targets = mixed.read(range(47))
    sources, _ = mixed.place(range(47))
    for number, (name, part) in enumerate(mixed.parts().items()):
        assert len(part) == (sources == number).sum() > 0, "as many were packed as are taken"
        expected = part.read(range(len(part)))
        for ours, theirs in zip((inputs, targets), expected, strict=True):
            np.testing.assert_array_equal(ours[sources == number], theirs)
        assert set(np.unique(inputs[sources == number])) == {BOS, ord(name) + 1}


def test_rows_are_found_by_number_in_any_order_and_process(mixed: MixedRows) -> None:
    inputs, _ = mixed.read(range(47))
    order = np.random.RandomState(0).permutation(47)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mixed)).read(order)[0], inputs[order])
    assert mixed.read([])[0].shape == (0, T)
    for wrong in (-1, 47):
        with pytest.raises(IndexError, match=f"row {wrong} of 47"):
            mixed.read([0, wrong])


def test_an_address_names_the_source(mixed: MixedRows) -> None:
    for row in range(47):
        source, place = (int(found[0]) for found in mixed.place([row]))
        name = "abc"[source]
        addresses, theirs = mixed.address(row), mixed.parts()[name].address(place)
        assert {piece.shard for piece in addresses} == {f"{name}/{name}.txt"}
        assert [piece.document for piece in addresses] == [piece.document for piece in theirs]


def test_a_mixture_reads_of_each_source_its_share_of_the_characters() -> None:
    parts = {"a": ListSource({"a": ["a" * 10] * 50}), "b": ListSource({"b": ["b" * 7, "b" * 30, ""] * 40})}
    source = MixedSource(parts, MixtureSchedule([1, 3]))
    given = {"a": 0, "b": 0}
    for text in itertools.islice(source.documents(document_chars=20), 150):
        assert len(text) <= 20
        given["ab"[text.startswith("b")]] += len(text)
        assert abs(given["a"] - sum(given.values()) / 4) <= 20
    texts = list(source.documents(document_chars=20))
    assert texts == list(source.documents(document_chars=20))
    # b is read twice before the whole of a has had its turn.
    assert texts.count("a" * 10) == 50 and texts.count("b" * 7) > 40


def test_a_small_source_is_not_read_for_ever() -> None:
    parts = {"long": ListSource({"a": ["a" * 10] * 5_000}), "small": ListSource({"b": ["b" * 10]})}
    texts = list(MixedSource(parts, MixtureSchedule([1, 1])).documents(1_000))
    assert texts.count("b" * 10) == MAX_READS and texts.count("a" * 10) in (MAX_READS, MAX_READS + 1)


def test_a_source_without_text_is_named() -> None:
    parts = {"full": ListSource({"a": ["words"]}), "hollow": ListSource({"b": ["", ""]})}
    with pytest.raises(UserError, match=r"data\.sources\.hollow: no training document of it has any text"):
        list(MixedSource(parts, MixtureSchedule([1, 1])).documents(1_000))


def local(path: Path, weight: float, **keys: object) -> WeightedSource:
    return WeightedSource(name="local", path=str(path), weight=weight, **keys)  # type: ignore[arg-type]


def test_what_is_wrong_with_files_names_the_source(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("words of one\n\n" * 20, encoding="utf-8")
    settings = DataSettings(name="mixture", sources={"one": local(tmp_path, 1), "two": local(tmp_path / "none", 1)})
    with pytest.raises(UserError, match=r"data\.sources\.two\.path=.*no such file"):
        open_source(settings, tmp_path / "cache")
    # The same file by two ways: it would be trained on with both weights, unnoticed.
    settings = DataSettings(
        name="mixture", sources={"one": local(tmp_path, 1), "two": local(tmp_path / "one.txt", 1), "off": None}
    )
    with pytest.raises(UserError, match=r"sources\.two: one\.txt is the same text as one\.txt of data\.sources\.one"):
        open_source(settings, tmp_path / "cache")


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"path": "a.jsonl"}, {"path": "[a].jsonl", "validation_fraction": 0.2}),
        ({"path": "b.jsonl", "validation_path": "a.jsonl"}, {"path": "copy.jsonl"}),
        ({"path": "a.jsonl"}, {"path": "b.jsonl", "validation_path": "copy.jsonl"}),
    ],
)
def test_no_source_trains_on_what_another_holds_out(
    tmp_path: Path, one: dict[str, object], two: dict[str, object]
) -> None:
    """Files were compared together with the rule by which they are split, so the same ones passed for others."""
    for name, text in (("a", "words"), ("b", "others"), ("copy", "words")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}", "title": "of {text}"}}\n' * 9, encoding="utf-8")

    def opened(*parts: dict[str, object]) -> object:
        keys = [
            {key: str(tmp_path / str(v)) if key.endswith("path") else v for key, v in part.items()} for part in parts
        ]
        sources = {
            name: build(WeightedSource, {"name": "local", "weight": 1, **part})
            for name, part in zip(("one", "two"), keys, strict=True)
        }
        return open_source(DataSettings(name="mixture", sources=dict(sources)), tmp_path / "cache")

    with pytest.raises(UserError, match=r"data\.sources\.two: .* is the same text as .* of data\.sources\.one"):
        opened(one, two)
    assert opened({"path": "a.jsonl"}, {"path": "a.jsonl", "text_column": "title"}), "another column is another text"


def test_classes_of_ones_own_are_mixed_with_other_sources() -> None:
    """They have neither path nor repository, and any two of them were taken for the same text."""
    own = {"name": "custom", "target": "a.B", "weight": 1}
    sources = {"one": own, "two": {**own, "options": {"n": 2}}, "docs": {"name": "python_docs", "weight": 1}}
    settings = build(DataSettings, {"name": "mixture", "sources": sources}, "data")
    assert settings.own_classes == ["a.B", "a.B"]
    with pytest.raises(UserError, match="is the same text as"):
        build(DataSettings, {"name": "mixture", "sources": {"one": own, "two": own}}, "data")


def test_the_order_of_the_sources_is_that_of_their_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"words of {name}\n\n" * 20, encoding="utf-8")
    found = []
    for names in ("ab", "ba"):
        sources = {name: local(tmp_path / f"{name}.txt", 1 + (name == "a")) for name in names}
        source = open_source(DataSettings(name="mixture", sources=sources), tmp_path / "cache")
        found.append((source.fingerprint, source.describe()))
    assert found[0] == found[1] and "a, 0.6667 of the tokens: " in found[0][1]


MINE = {"name": "local", "path": "x", "weight": 1.0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sources": {}}, "data.sources: data=mixture needs some"),
        ({"sources": {"a": None}}, "data.sources: data=mixture needs some"),
        ({"sources": {"a": {**MINE, "wieght": 2}}}, "data.sources.a.wieght: there is no such key; did you mean"),
        ({"sources": {"a": {"name": "local", "path": "x"}}}, "data.sources.a.weight: is missing"),
        ({"sources": {"a": {**MINE, "weight": 0}}}, "data.sources.a.weight=0: is not above 0"),
        ({"sources": {"a": {**MINE, "weight": -2.0}}}, "data.sources.a.weight=-2.0: is not above 0"),
        ({"sources": {"a": {**MINE, "weight": float("inf")}}}, "data.sources.a.weight=inf: must be a number"),
        ({"sources": {"a": {**MINE, "weight": "much"}}}, "data.sources.a.weight='much': must be a number"),
        ({"sources": {"a": MINE, "b": {"weight": 1e-6}}}, "data.sources.b.weight=1e-06: is less than 1e-05"),
        ({"sources": {"a": MINE, "b": MINE}}, "data.sources.b: is the same text as sources.a"),
        ({"sources": {"a": {"name": "mixture", "weight": 1}}}, "data.sources.a.name='mixture': must be one of"),
        ({"sources": {"a": {**MINE, "sources": {}}}}, "data.sources.a.sources: there is no such key"),
        ({"sources": {"a b": MINE}}, "data.sources.a b: names have letters"),
        ({"sources": {"stderr": MINE}}, "data.sources.stderr: a metric of the log has that name"),
        ({"sources": {"a": {"name": "local", "weight": 1}}}, "data.sources.a.path: is missing: name=local needs path="),
        ({"sources": {"a": {**MINE, "repo": "o/n"}}}, "data.sources.a.repo='o/n': has no meaning for name=local"),
        ({"sources": {"a": MINE}, "shuffle": "none"}, "data.shuffle='none': has no meaning for data=mixture"),
        ({"sources": {"a": MINE}, "name": "python_docs"}, "data.sources: have no meaning for data=python_docs"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        build(DataSettings, {"name": "mixture", **values}, "data")
    assert words in " ".join(caught.value.problems)


def test_settings_come_back_from_a_bundle_as_they_were() -> None:
    values = {
        "name": "mixture",
        "sources": {"b": MINE, "hub": {"name": "hub", "repo": "o/n", "weight": 3}, "off": None},
    }
    settings = build(DataSettings, values)
    assert build(DataSettings, to_plain(settings)) == settings
    assert list(settings.parts) == ["b", "hub"] and settings.own_paths == ["x"]
    fetching = build(DataSettings, {**values, "sources": {"hub": {**values["sources"]["hub"], "download": True}}})  # type: ignore[index]
    assert fetching.parts["hub"].download and not fetching.without_download().parts["hub"].download


def test_bits_per_byte_of_a_mixture_are_weighted_however_many_rows_were_measured() -> None:
    generator = torch.Generator().manual_seed(0)

    def measured(num_rows: int) -> torch.Tensor:
        metric = BitsPerByte(np.array([1, 2, 3]))
        metric.update(
            torch.rand(num_rows, 8, generator=generator), torch.randint(3, (num_rows, 8), generator=generator)
        )
        return metric.of_all_processes()[0]

    # With rows as the shares are it is the metric of all rows.
    one, other = measured(30), measured(10)
    weighted, plain = weighted_result([one, other], [0.75, 0.25]), result_of((one + other).tolist())
    assert weighted.bpb == pytest.approx(plain.bpb, rel=1e-12)
    assert weighted.stderr == pytest.approx(plain.stderr, rel=1e-12)
    # Otherwise each set counts by its share: nats a row over bytes a row.
    weighted = weighted_result([one, other], [0.5, 0.5])
    nats, size = (one / 30 + other / 10)[:2].tolist()
    assert weighted.bpb == pytest.approx(nats / size / np.log(2), rel=1e-12)
    assert weighted_result([torch.zeros(6).double()], [1.0]).bpb is None


def test_a_mixture_of_one_source_has_its_figure_too() -> None:
    """One source without a mixture has no name, and no second figure of the same."""
    sums = BitsPerByte()
    sums.update(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    assert (
        validation_metrics({"wiki": sums}, [1.0])["val/bpb_wiki"]
        == validation_metrics({"wiki": sums}, [1.0])["val/bpb"]
    )
    assert not [
        name for name in validation_metrics({"": sums}, [1.0]) if name.startswith("val/bpb_") and "stderr" not in name
    ]
