"""Streaming text never splits a character and adds up to the whole."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.inference.tokens import REPLACEMENT, Detokenizer

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60) | st.sampled_from(
    ["灵渠沟通了湘江和漓江。", "👩‍👩‍👧‍👦 family 👍🏽", "שלום עולם", "naïve café", "a\n\n  b\tc", "e\u0301"]
)


@settings(deadline=None)
@given(text=texts, sizes=st.lists(st.integers(1, 4), min_size=1))
def test_deltas_add_up_to_the_decoded_text(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer, deltas, at = Detokenizer(tokenizer), [], 0
    for turn in range(len(ids)):
        size = sizes[turn % len(sizes)]
        deltas.append(detokenizer.push(ids[at : at + size]))
        at += size
    deltas.append(detokenizer.finish())
    assert "".join(deltas) == tokenizer.decode(ids)


@settings(deadline=None)
@given(text=texts)
def test_no_delta_has_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    if REPLACEMENT not in tokenizer.decode(ids):
        assert all(REPLACEMENT not in detokenizer.push([token]) for token in ids)


def test_bytes_that_are_no_text_do_not_hold_back_for_ever(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("👍", add_special_tokens=False).ids[:1]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(broken) for _ in range(40))
    assert REPLACEMENT in shown


def test_an_unfinished_character_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 👍", add_special_tokens=False).ids[:-1]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push([token]) for token in ids)
    assert REPLACEMENT not in shown
    assert shown + detokenizer.finish() == tokenizer.decode(ids)
