"""Calls of tools in generated text, wherever pieces split it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.inference.calls import CallReader, forced, parse
from services.inference.chat import Tool

NAMES = ("add", "look-up")
ADD = '{"name": "add", "arguments": {"a": 1, "b": "灵"}}'
LOOK = '{"name": "look-up", "arguments": {}}'


def read(*pieces: str) -> tuple[str, list[tuple[str, object]]]:
    """All the text, and the calls by name with their arguments."""
    reader = CallReader(NAMES)
    parts = [*(reader.push(piece) for piece in pieces), reader.finish()]
    calls = [call for _, found in parts for call in found]
    assert all(call.arguments.encode() for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return "".join(text for text, _ in parts), [(c.name, json.loads(c.arguments)) for c in calls]


ONE = [("add", {"a": 1, "b": "灵"})]
BOTH = [*ONE, ("look-up", {})]
CASES = [
    ("", "", []),
    ("plain text", "plain text", []),
    ("a < b <tool> c", "a < b <tool> c", []),
    (f"<tool_call>{ADD}</tool_call>", "", ONE),
    (f"\n<tool_call>\n{ADD}\n</tool_call>\n", "", ONE),
    (f"<tool_call>{ADD}</tool_call>\n<tool_call>{LOOK}</tool_call>", "", BOTH),
    (f"I add. <tool_call>{ADD}</tool_call>", "I add. ", ONE),
    (f"<tool_call>{ADD}</tool_call> Done.", "Done.", ONE),
    (f"<tool_call>{ADD}", "", ONE),
    ("<tool_call>{nonsense}</tool_call>", "<tool_call>{nonsense}</tool_call>", []),
    ("<tool_call>cut", "<tool_call>cut", []),
    ("  <tool_ca", "  <tool_ca", []),
    (ADD, "", ONE),
    (f"[{ADD}, {LOOK}]", "", BOTH),
    ('{"name": "add", "parameters": {}}', "", [("add", {})]),
    ('{"name": "add", "arguments": "{\\"a\\": 2}"}', "", [("add", {"a": 2})]),
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ('{"name": "add", "arguments": 7}', '{"name": "add", "arguments": 7}', []),
    ('{"name": ["add"]}', '{"name": ["add"]}', []),
    (f"[{ADD}, 7]", f"[{ADD}, 7]", []),
    ("[]", "[]", []),
    ('{"answer": 1}', '{"answer": 1}', []),
    ('{"name": "add", "arguments": {"a": "\\ud83d"}}', "", [("add", {"a": "\ud83d"})]),
    ('{"name": "add", "arguments": {"a": NaN}}', '{"name": "add", "arguments": {"a": NaN}}', []),
    ("[" * 5000, "[" * 5000, []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "left", "calls"), CASES, ids=lambda v: str(v)[:30])
def test_calls_are_taken_out_of_the_text(text: str, left: str, calls: list[tuple[str, object]]) -> None:
    found, taken = read(text)
    assert taken == calls
    assert found.strip() == left.strip() if calls else found == left


@example(f"\n<tool_call>\n{ADD}\n</tool_call>\n", [74])
@given(st.sampled_from([case[0] for case in CASES[:-1]]), st.lists(st.integers(0, 100), max_size=8))
def test_it_does_not_matter_where_pieces_are_split(text: str, cuts: list[int]) -> None:
    at = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    pieces = [text[a:b] for a, b in pairwise(at)]
    assert read(*pieces) == read(text)


@given(st.text(alphabet="<>/tool_ca {}[]\n灵", max_size=60))
def test_text_without_calls_is_unchanged(text: str) -> None:
    assert read(*text) == (text, [])


def test_text_that_is_no_call_is_passed_on_at_once() -> None:
    reader = CallReader(NAMES)
    assert reader.push("Hello") == ("Hello", [])
    assert reader.push(" <b>") == (" <b>", [])


def test_a_forced_call_is_what_the_reader_reads() -> None:
    schema = json.loads(forced([Tool("add", "", '{"type": "object"}'), Tool("look-up")]).text)
    names = [branch["properties"]["name"]["const"] for branch in schema["anyOf"]]
    assert names == list(NAMES)
    assert [c.name for c in parse('{"name": "add", "arguments": {}}', NAMES)] == ["add"]
    single = json.loads(forced([Tool("add", "", '{"type": "object", "required": ["a"]}')]).text)
    assert single["properties"]["arguments"]["required"] == ["a"]
