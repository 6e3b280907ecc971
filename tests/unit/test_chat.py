"""Chat templates render as the model was trained, and refuse in the caller's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.bundled import TEXT_MODEL
from services.core.errors import InvalidInput
from services.inference.chat import Call, ChatTemplate, Tool, Turn
from services.inference.tokens import special_tokens

# As models have them: Llama, Mistral, Hermes and Qwen, SmolLM3.
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "{% if tools is not none %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}{{ documents }}",
    "{% for t in tools or [] %}{{ t.function.parameters | tojson(indent=2) }}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}",
]
TOOL = Tool("add", "adds a & b, <b>'灵渠'</b>", '{"type": "object", "properties": {"b": {}, "a": {}}}')
CALLS = (Call("1", "add", '{"b": "灵 <渠>", "a": 1}'),)
CHAT = [Turn("user", " Hello "), Turn("assistant", "", CALLS)]


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


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_prompts_are_what_transformers_makes_of_them(source: str, tools: list[Tool]) -> None:
    if tools and "tools" not in source:
        pytest.skip("says nothing of tools")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    called = {"name": "add", "arguments": {"b": "灵 <渠>", "a": 1}}
    messages = [
        {"role": "user", "content": " Hello "},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": called}],
        },
    ]
    function = {
        "name": TOOL.name,
        "description": TOOL.description,
        "parameters": json.loads(TOOL.parameters),
    }
    (expected,), _ = render_jinja_template(
        [messages],
        tools=[{"type": "function", "function": function}] if tools else None,
        chat_template=source,
        add_generation_prompt=True,
        **special,
    )
    assert ChatTemplate(source, special).render(CHAT, tools) == expected


@pytest.mark.parametrize(
    "parameters", ['{"properties": 5}', '{"properties": {"a": []}}', '{"properties": {"a": "\\ud800"}}']
)
def test_values_that_a_template_was_not_written_for_are_refused(parameters: str) -> None:
    template = ChatTemplate(
        "{% for t in tools %}{% for a in t.function.parameters.properties %}"
        "{{ t.function.parameters.properties[a] + '' }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InvalidInput) as refused:
        template.render([Turn("user", "x")], [Tool("f", "", parameters)])
    assert refused.value.field == "messages"


def test_special_tokens_are_the_tokenizers() -> None:
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    assert special_tokens(tokenizer, [1]) == {"eos_token": "</s>"}
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert special_tokens(tokenizer, [1]) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert special_tokens(tokenizer, []) == {"bos_token": "<s>"}
