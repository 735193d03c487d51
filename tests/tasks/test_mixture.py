"""The mixture: every conversation as often as it should be, evenly, in an order that is always the same."""

from __future__ import annotations

from collections import Counter

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.tasks.base import Task
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import Mixture, build_mixture, build_tasks
from nanochat_pl.tasks.settings import JoinedSettings, MixtureSettings
from nanochat_pl.tasks.synthetic.words import count_documents
from tests.helpers.small_engine import byte_tokenizer

SMALL = {"arithmetic": {"size": 300}, "identity": {"repeat": 2, "name": "Ada"}}


class Numbers(Task):
    """A task whose conversations are their own numbers."""

    def __init__(self, name, size):
        super().__init__(name, "train", size)

    def conversation(self, index):
        return {"messages": [{"role": "user", "content": self.name}, {"role": "assistant", "content": str(index)}]}

    def evaluate(self, conversation, answer):
        return True


def mixture(seed=0, **sizes):
    return Mixture({name: Numbers(name, size) for name, size in sizes.items()}, {"b": 3}, seed)


def test_every_conversation_occurs_as_often_as_its_task_is_repeated():
    mixed = mixture(a=50, b=10)
    assert len(mixed) == 80
    assert Counter(mixed.place(n) for n in range(80)) == Counter(
        {**{("a", n): 1 for n in range(50)}, **{("b", n): 3 for n in range(10)}}
    )
    assert mixed[7]["messages"][0]["content"] == mixed.place(7)[0]
    with pytest.raises(IndexError):
        mixed[80]


def test_more_conversations_than_memory_holds_are_refused_with_the_key():
    """A repeat of a billion filled the memory, and for minutes no Ctrl-C ended it."""
    tasks = {"a": Numbers("a", 30), "b": Numbers("b", 5)}
    with pytest.raises(
        UserError, match=r"mixture\.tasks\.a\.repeat=1000000000: .* 30,000,000,000 in an epoch"
    ) as raised:
        Mixture(tasks, {"a": 10**9}, seed=0)
    assert "mixture.tasks.a.size" in raised.value.fix


def test_order_is_even_and_depends_on_the_seed_alone():
    mixed = mixture(a=6_000, b=1_000)
    places = [mixed.place(n) for n in range(len(mixed))]
    for start in range(0, len(mixed), 900):
        assert 0.25 < sum(name == "b" for name, _ in places[start : start + 900]) / 900 < 0.42
    swapped = mixture(b=1_000, a=6_000)
    assert [swapped.place(n) for n in range(len(swapped))] == places, "the order of the tasks does not matter"
    assert [mixture(1, a=6_000, b=1_000).place(n) for n in range(50)] != places[:50]


def test_a_sequence_goes_through_the_tasks_one_after_the_other():
    tasks = {name: Numbers(name, size) for name, size in {"a": 40, "b": 10, "c": 30}.items()}
    curriculum = Mixture(tasks, {"b": 3}, 0, ["b", "c", "a"])
    places = [curriculum.place(n) for n in range(len(curriculum))]
    assert curriculum.in_sequence and list(curriculum.tasks) == ["b", "c", "a"]
    assert [name for name, _ in places] == ["b"] * 30 + ["c"] * 30 + ["a"] * 40
    a = [("a", n) for n in range(40)]
    assert Counter(places) == Counter([*a, *[("b", n) for n in range(10)] * 3, *(("c", n) for n in range(30))])
    assert places[60:] != a, "each task is in an order of its own"
    assert [Mixture(tasks, {"b": 3}, 0, ["b", "c", "a"]).place(n) for n in range(100)] == places
    other = Mixture(tasks, {"b": 3}, 1, ["b", "c", "a"])
    assert [other.place(n) for n in range(100)] != places
    mixed = Mixture(tasks, {"b": 3}, 0)
    assert not mixed.in_sequence
    prints = [each.fingerprint for each in (curriculum, other, mixed, Mixture(tasks, {"b": 3}, 0, ["a", "b", "c"]))]
    assert len(set(prints)) == 4


def test_a_sequence_is_for_training_and_not_for_what_is_held_out(tmp_path):
    settings = build(MixtureSettings, {"tasks": SMALL, "sequence": ["identity", "arithmetic"]})
    train, test = (build_mixture(settings, split, TaskContext(tmp_path)) for split in ("train", "test"))
    first = [train.place(n)[0] for n in range(len(train))]
    assert first == sorted(first, reverse=True) and train.in_sequence and not test.in_sequence
    assert build(MixtureSettings, to_plain(settings)) == settings


def joined(share=0.5, max_turns=4, seed=0, sequence=None, **sizes):
    tasks = {name: Numbers(name, size) for name, size in sizes.items()}
    return Mixture(tasks, {"b": 3}, seed, sequence, JoinedSettings(share, max_turns))


@pytest.mark.slow
def test_joined_conversations_have_every_one_of_the_tasks_as_often_as_before():
    single, mixed = mixture(a=3_000, b=500), joined(a=3_000, b=500)
    places = [mixed.places(n) for n in range(len(mixed))]
    assert Counter(place for each in places for place in each) == Counter(single.place(n) for n in range(len(single)))
    turns = [len(each) for each in places]
    assert set(turns) == {1, 2, 3, 4}
    assert mixed.num_joined == sum(n > 1 for n in turns) and mixed.num_turns == sum(n for n in turns if n > 1)
    assert 0.45 < mixed.num_turns / len(single) < 0.55, "the share is of the tasks' conversations"
    assert sum(len({name for name, _ in each}) > 1 for each in places) > 0.5 * mixed.num_joined, "subjects change"
    assert f"{mixed.num_turns:,} of the tasks' conversations are turns of {mixed.num_joined:,} longer" in (
        mixed.describe_joined()
    )
    assert single.num_joined == single.num_turns == 0 and single.describe_joined() == ""
    assert [joined(a=3_000, b=500).places(n) for n in range(200)] == places[:200]
    assert [joined(a=3_000, b=500, seed=1).places(n) for n in range(200)] != places[:200]
    alone = [each[0] for each in places if len(each) == 1]
    assert mixed.count_copies() == len(alone) - len(set(alone)) > 0 and single.count_copies() == 1_000
    all_joined = joined(share=1.0, max_turns=2, a=100, b=10)
    assert len(all_joined) == 65 and all_joined.num_joined == 65 and all_joined.num_turns == 130


def test_a_joined_conversation_is_its_turns_one_after_the_other():
    mixed = joined(share=1.0, max_turns=3, a=40, b=10)
    for n in range(len(mixed)):
        places = mixed.places(n)
        assert mixed[n]["messages"] == [m for name, place in places for m in mixed.tasks[name][place]["messages"]]
        assert mixed.place(n) == places[0]
    with pytest.raises(IndexError):
        mixed.places(len(mixed))


def test_every_answer_of_a_joined_conversation_is_trained_on():
    tokenizer, mixed = byte_tokenizer(), joined(share=1.0, max_turns=5, a=40, b=10)
    ids, mask = tokenizer.render_conversation(mixed[0])
    answers = [tokenizer.render_conversation(mixed.tasks[name][place]) for name, place in mixed.places(0)]
    assert len(answers) > 1
    assert ids == [tokenizer.bos_id, *(token for of_one, _ in answers for token in of_one[1:])]
    assert mask == [0, *(trained for _, of_one in answers for trained in of_one[1:])]


def test_conversations_of_files_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(Numbers, "can_be_joined", property(lambda self: self.name != "c"))
    mixed = joined(share=1.0, max_turns=4, a=100, b=10, c=50)
    places = [mixed.places(n) for n in range(len(mixed))]
    assert sum(each[0][0] == "c" for each in places) == 50
    assert all(len(each) == 1 for each in places if any(name == "c" for name, _ in each))


def test_in_a_sequence_nothing_is_joined_across_tasks():
    mixed = joined(share=1.0, max_turns=6, sequence=["b", "a"], a=101, b=11)
    places = [mixed.places(n) for n in range(len(mixed))]
    assert all(len({name for name, _ in each}) == 1 for each in places)
    assert [name for each in places for name, _ in each] == ["b"] * 33 + ["a"] * 101


def test_joining_is_for_training_and_not_for_what_is_held_out(tmp_path):
    settings = build(MixtureSettings, {"tasks": SMALL, "joined": {"share": 0.6}})
    train, test = (build_mixture(settings, split, TaskContext(tmp_path)) for split in ("train", "test"))
    assert train.num_joined > 50 and test.num_joined == 0
    assert build(MixtureSettings, to_plain(settings)) == settings
    held_out = {test[n]["messages"][0]["content"] for n in range(len(test))}
    asked = {m["content"] for n in range(len(train)) for m in train[n]["messages"] if m["role"] == "user"}
    assert not held_out & asked


def test_fingerprint_changes_with_content_order_and_repeats():
    base = mixture(a=5, b=5).fingerprint
    assert base == mixture(b=5, a=5).fingerprint
    others = {mixture(1, a=5, b=5).fingerprint, mixture(a=6, b=5).fingerprint, mixture(a=5, c=5).fingerprint}
    with_joined = {joined(share=share, a=5, b=5).fingerprint for share in (0, 0.3, 0.6)}
    assert base in with_joined and len(others | with_joined) == 6


def test_built_from_settings(tmp_path):
    settings = build(MixtureSettings, {"tasks": SMALL, "seed": 3})
    context = TaskContext(tmp_path)
    train, test = build_mixture(settings, "train", context), build_mixture(settings, "test", context)
    assert set(train.tasks) == set(test.tasks) == {"arithmetic", "identity"}
    assert len(train) == 300 + 2 * len(train.tasks["identity"])
    assert test.repeats == {"arithmetic": 1, "identity": 1}
    assert "Ada" in str(train.tasks["identity"][0])
    assert not list(tmp_path.iterdir()), "no corpus is built where no task needs it"
    assert list(build_tasks(settings.tasks, "test", context)) == ["arithmetic", "identity"]


def test_defaults_are_all_tasks_and_survive_yaml():
    settings = MixtureSettings()
    assert len(settings.tasks.chosen()) == 7
    assert build(MixtureSettings, to_plain(settings)) == settings
    left_out = build(MixtureSettings, {"tasks": {**to_plain(settings.tasks), "identity": None}})
    assert "identity" not in left_out.tasks.chosen()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tasks": {"arithmetc": {}}},
            "mixture.tasks.arithmetc: there is no such key; did you mean mixture.tasks.arithmetic?",
        ),
        ({"tasks": {"spelling": {"sise": 3}}}, "did you mean mixture.tasks.spelling.size"),
        ({"tasks": {"arithmetic": {"size": "many"}}}, "mixture.tasks.arithmetic.size='many'"),
        ({"tasks": {"arithmetic": {"small_operand": 2_000}}}, "above max_operand"),
        ({"tasks": {"spelling": {"min_letters": 9, "max_letters": 8}}}, "above max_letters"),
        ({"tasks": {"identity": {"name": " "}}}, "must not be empty"),
        ({"tasks": {"identity": None}}, "no task is chosen"),
        ({"tasks": SMALL, "joined": {"share": 1.5}}, "mixture.joined.share=1.5: is above 1"),
        ({"tasks": SMALL, "joined": {"max_turns": 1}}, "mixture.joined.max_turns=1: is below 2"),
        ({"tasks": SMALL, "sequence": ["identity"]}, "mixture.sequence: arithmetic: left out"),
        ({"tasks": SMALL, "sequence": ["identity", "arithmetic", "gsm8k"]}, "mixture.sequence: gsm8k: no task of the"),
        ({"tasks": SMALL, "sequence": ["identity", "arithmetic", "identity"]}, "mixture.sequence: identity: more than"),
        ({"tasks": SMALL, "sequence": "identity"}, "mixture.sequence='identity': must be"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(UserError) as error:
        build(MixtureSettings, values, "mixture")
    assert message in str(error.value)


def test_words_are_prose_words_counted_by_document():
    texts = [
        "The apple, the Apple and an apple. (pear) `code` self.field some_name x2",
        "A well-known apple, see apple.core or foo(bar); param: ends here.",
    ]
    counts = count_documents(texts)
    assert counts["apple"] == 2 and counts["ends"] == 1
    assert not {"code", "field", "some", "name", "core", "foo", "bar", "pple", "param"} & set(counts)
