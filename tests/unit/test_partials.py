"""No two prompts that are computed at the same time go on from the same block that is filled in part."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.backends.partials import BLOCK_TOKENS, Partials

LENGTHS = st.sampled_from((1, 2, 5, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS))


class Model:
    """What the cache could hold, and what each prompt may have gone on from."""

    def __init__(self) -> None:
        self.contents: set[tuple[int, ...]] = set()
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.origins: dict[int, set[tuple[int, ...]]] = {}
        self.streams: dict[int, tuple[int, ...]] = {}

    def origin(self, prompt: tuple[int, ...]) -> set[tuple[int, ...]]:
        held = self.contents | {stream[:-1] for stream in self.streams.values()}
        held = held.union(*(self.origins[number] for number in self.prompts))
        return {c for c in held if len(c) % BLOCK_TOKENS and prompt[: len(c)] == c}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_two_prompts_go_on_from_the_same_partial_block(data: st.DataObject) -> None:
    model, partials = Model(), Partials()
    for number in range(data.draw(st.integers(5, 40), label="operations")):
        verb = data.draw(st.sampled_from(("ask", "ask", "grow", "end")))
        if verb == "ask":
            base = data.draw(st.sampled_from([(), *sorted(model.contents)[-6:], *model.streams.values()]))
            prompt = base[: data.draw(LENGTHS)] + (data.draw(st.integers(1, 3)),) * data.draw(LENGTHS)
            origin = model.origin(prompt)
            if partials.claim(number, prompt):
                assert not any(origin & model.origins[other] for other in model.prompts)
                model.prompts[number], model.origins[number] = prompt, origin
        elif model.prompts or model.streams:
            chosen = data.draw(st.sampled_from(sorted({**model.prompts, **model.streams})))
            if verb == "grow":
                model.streams[chosen] = (model.prompts.pop(chosen, None) or model.streams[chosen]) + (1,)
                partials.grew(chosen, [1])
            else:
                model.prompts.pop(chosen, None)
                model.contents.add(model.streams.pop(chosen, ())[:-1])
                partials.ended(chosen)
    for number in [*model.prompts, *model.streams]:
        partials.ended(number)
    assert partials.claim(1000, [1] * 40), "nothing is claimed any more"


def test_who_waits_is_let_in_when_the_other_prompt_is_computed() -> None:
    partials = Partials()
    assert partials.claim(1, [7, 8, 9])
    partials.grew(1, [4])
    partials.ended(1)
    assert partials.claim(2, [7, 8, 9, 10])
    assert not partials.claim(3, [7, 8, 9, 11])
    assert partials.claim(4, [7, 8, 10]), "it begins otherwise"
    partials.grew(2, [5])
    assert partials.claim(3, [7, 8, 9, 11])


def test_unrelated_prompts_and_whole_blocks_are_computed_together() -> None:
    partials = Partials()
    whole = list(range(BLOCK_TOKENS))
    assert partials.claim(1, whole)
    partials.grew(1, [4])
    assert all(partials.claim(number, [*whole, number]) for number in range(2, 6))
    assert all(partials.claim(number, [number]) for number in range(10, 20))
