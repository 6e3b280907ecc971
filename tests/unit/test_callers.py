"""What the gateway says of a request, and what inference makes of it."""

from __future__ import annotations

import pytest

from services.inference.callers import Priority, answering, capped


@pytest.mark.parametrize(
    ("asked", "most", "gets"),
    [
        (Priority.INTERACTIVE, "3", Priority.BATCH),
        (Priority.INTERACTIVE, "2", Priority.NORMAL),
        (Priority.BATCH, "1", Priority.BATCH),
        (Priority.INTERACTIVE, "", Priority.INTERACTIVE),
        (Priority.INTERACTIVE, "soon", Priority.INTERACTIVE),
    ],
)
def test_no_request_is_more_urgent_than_its_client_may_be(asked: Priority, most: str, gets: Priority) -> None:
    assert capped(asked, {"x-lingqu-max-priority": most} if most else {}) is gets


def test_the_gateway_may_have_another_model_answer() -> None:
    assert answering("m", {}) == "m"
    assert answering("m", {"x-lingqu-fallback": "spare"}) == "spare"
