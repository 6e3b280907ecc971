"""Chat templates render as the model was trained, and refuse in the caller's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bundled import TEXT_MODEL
from services.core.errors import InvalidInput
from services.inference.chat import ChatTemplate, Turn


def test_the_bundled_models_template(artifacts: dict[str, Path]) -> None:
    template = ChatTemplate((artifacts[TEXT_MODEL] / "chat_template.jinja").read_text())
    prompt = template.render([Turn("system", "Be brief."), Turn("user", "Hello")])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidInput, match="roles must alternate"):
        template.render([Turn("user", "x")])


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}")
    with pytest.raises(InvalidInput):
        template.render([Turn("user", "x")])
