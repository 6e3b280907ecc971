"""What is the same request, and what is kept: exact, bounded, by version."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.discovery import VersionKey
from services.inference.answers import ENTRY_BYTES, LARGEST, AnswerKey, Answers, answer_key, complete, merged
from services.inference.backends.jobs import Finish, Grammar, GrammarKind
from services.inference.chat import Call, Tool, Turn
from services.inference.text import Delta, GenerateJob, Logprob

KEY = VersionKey("m", 1)
GREEDY = GenerateJob("hello", ())
SAMPLED = GenerateJob("hello", (), temperature=0.7, seed=1)

OTHERS: list[dict[str, Any]] = [
    {"prompt": "Hello"},
    {"prompt": "hello\ud800"},
    {"prompt": None, "turns": (Turn("user", "hello"),)},
    {"prompt": None, "prompt_ids": (1, 2)},
    {"max_tokens": 7},
    {"temperature": 0.8},
    {"top_p": 0.5},
    {"top_k": 5},
    {"min_p": 0.1},
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.1},
    {"frequency_penalty": 0.1},
    {"seed": 2},
    {"stop": ("x",)},
    {"n": 2},
    {"logprobs": True},
    {"grammar": Grammar(GrammarKind.REGEX, "a")},
    {"tools": (Tool("f"),)},
]


@pytest.mark.parametrize("fields", OTHERS, ids=lambda fields: "-".join(fields))
def test_everything_that_matters_is_part_of_the_key(fields: dict[str, Any]) -> None:
    one, other = answer_key(KEY, SAMPLED, "c"), answer_key(KEY, replace(SAMPLED, **fields), "c")
    assert one is not None
    assert one != other
    assert one == answer_key(KEY, replace(SAMPLED), "c")


def test_every_field_of_a_job_was_thought_of() -> None:
    """A new field is part of the key by itself; this makes sure that somebody tests it."""
    tested = {name for fields in OTHERS for name in fields} | {"cached"}
    assert set(GenerateJob.__dataclass_fields__) == tested


def test_clients_versions_and_strangers_are_apart() -> None:
    keys = {
        answer_key(version, GREEDY, client)
        for version in (KEY, VersionKey("m", 2))
        for client in ("a", "", None)
    }
    assert len(keys) == 6


def test_turns_that_only_look_alike_are_apart() -> None:
    chats = [
        (Turn("user", "a"), Turn("user", "b")),
        (Turn("user", "a', 'b"),),
        (Turn("user", "ab"),),
        (Turn("assistant", "a", (Call("1", "f", "{}"),)),),
        (Turn("assistant", "a", (Call("1", "f", "{ }"),)),),
    ]
    assert len({answer_key(KEY, GenerateJob(None, turns), "c") for turns in chats}) == len(chats)


def test_what_changes_nothing_in_a_greedy_answer_is_no_part_of_the_key() -> None:
    same = replace(GREEDY, seed=9, top_p=0.5, top_k=3, min_p=0.2)
    assert answer_key(KEY, GREEDY, "c") == answer_key(KEY, same, "c")


def test_what_is_drawn_or_not_to_be_kept_has_no_key() -> None:
    assert answer_key(KEY, replace(SAMPLED, seed=None), "c") is None
    assert answer_key(KEY, replace(GREEDY, cached=False), "c") is None


# --- Merging ------------------------------------------------------------------------------------------

PIECES = st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=20)


@given(PIECES, st.lists(st.integers(0, 25), max_size=5), st.booleans())
def test_merged_pieces_say_the_same(pieces: list[tuple[int, str]], cuts: list[int], cached: bool) -> None:
    """However a stream is cut into batches, each candidate's text, tokens and end, and the last counts."""
    deltas = [Delta(text, index=i, logprobs=(Logprob(at, b"", -1.0),)) for at, (i, text) in enumerate(pieces)]
    deltas += [Delta("!", Finish.STOP, index=i) for i in (2, 0)] + [Delta("", Finish.LENGTH, 5, 9, index=1)]
    bounds = [0, *sorted(min(c, len(deltas)) for c in cuts), len(deltas)]
    got = [d for a, b in itertools.pairwise(bounds) if a < b for d in merged(deltas[a:b], cached)]
    for index in range(3):

        def mine(of: list[Delta], index: int = index) -> Any:
            own = [d for d in of if d.index == index]
            return "".join(d.text for d in own), [p for d in own for p in d.logprobs], own[-1].finish

        assert mine(got) == mine(deltas)
    assert (got[-1].prompt_tokens, got[-1].completion_tokens) == (5, 9)
    assert not any(d.prompt_tokens for d in got[:-1])
    assert all(d.cached == cached for d in got)
    assert len(merged(deltas, cached)) == 3


def test_only_whole_answers_are_complete() -> None:
    ends = [Delta("", Finish.STOP), Delta("", Finish.LENGTH, 1, 1, index=1)]
    assert complete(ends, 2)
    assert not complete(ends, 3)
    assert not complete(ends[:1], 2)
    assert not complete([], 1)
    assert not complete([Delta("", Finish.FAILED)], 1)


# --- Keeping ------------------------------------------------------------------------------------------


def answer(text: str) -> list[Delta]:
    return [Delta(text[:1]), Delta(text[1:], Finish.STOP, 3, 4)]


def key(number: int, version: int = 1) -> AnswerKey:
    return AnswerKey(VersionKey("m", version), bytes([number]))


def test_an_answer_comes_back_whole_and_says_that_it_was_kept() -> None:
    answers = Answers(1 << 20)
    assert answers.get(key(1)) is None
    assert answers.put(key(1), answer("canal"))
    assert answers.get(key(1)) == (Delta("canal", Finish.STOP, 3, 4, cached=True),)


def test_nothing_is_kept_without_memory_nor_what_is_too_large() -> None:
    assert not Answers(0).put(key(1), answer("canal"))
    answers = Answers(1 << 20)
    assert not answers.put(key(1), answer("x" * ((1 << 20) // LARGEST)))
    assert (answers.bytes, len(answers)) == (0, 0)


def test_the_least_recently_used_goes_first() -> None:
    answers = Answers(ENTRY_BYTES * 32)
    stored = 0
    while len(answers) == stored:  # until one had to go
        answers.put(key(stored), answer("canal"))
        answers.get(key(0))
        stored += 1
    assert answers.get(key(0)) is not None
    assert answers.get(key(1)) is None
    assert answers.bytes <= ENTRY_BYTES * 32


def test_versions_that_are_gone_take_their_answers_along() -> None:
    answers = Answers(1 << 20)
    for version in (1, 2):
        answers.put(key(1, version), answer("canal"))
    answers.keep_only({VersionKey("m", 2)})
    assert answers.get(key(1, 1)) is None
    assert answers.get(key(1, 2)) is not None
    answers.keep_only(())
    assert (answers.bytes, len(answers), dict(answers._of_version)) == (0, 0, {})


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(0, 3000)), max_size=60))
def test_the_memory_is_bounded_and_counted(puts: list[tuple[int, int, int]]) -> None:
    limit = 40 * ENTRY_BYTES
    answers = Answers(limit)
    for number, version, size in puts:
        if answers.put(key(number, version), answer("x" * size)):
            assert answers.get(key(number, version)) is not None
        assert answers.bytes <= limit
        assert answers.bytes == sum(size for _, size in answers._kept.values())
        assert sum(answers._of_version.values()) == len(answers)
