"""What REST clients send, field by field; also the source of the published OpenAPI document.

Only types and plain bounds are checked here. What the text API has a rule for is checked where that rule is
(convert.py). Fields of type Any are accepted and ignored, as docs/openai.md lists them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.inference.backends.jobs import MAX_PENALTY, MAX_REPETITION_PENALTY, MAX_TEMPERATURE, MAX_TOP_K
from services.inference.convert import MAX_CANDIDATES, MAX_INPUTS, MAX_STOPS, MAX_TURNS

MAX_INT = 2**31 - 1
MAX_CHOICES = 128

TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Name = Annotated[str, Field(min_length=1, description="Name of the model, as GET /v1/models lists it.")]
Schema = dict[str, Any]


def _at_most(items: int) -> Any:
    """Published here, checked in convert.py: pydantic would tell of the union's other branches."""
    return Field(json_schema_extra={"maxItems": items})


class Strict(BaseModel):
    """No value is converted, and what is not listed is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Any = None


class JsonSchema(Strict):
    name: str = ""
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """As vLLM has it."""

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class Generating(Strict):
    """What chats and completions have in common."""

    model: Name
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE, description="Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CANDIDATES)
    stop: str | Annotated[list[str], _at_most(MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    presence_penalty: float | None = Field(None, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float | None = Field(None, ge=-MAX_PENALTY, le=MAX_PENALTY)
    logit_bias: dict[str, Any] | None = Field(None, description="Must be empty.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None

    # Not OpenAI's.
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=MAX_REPETITION_PENALTY)
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    no_cache: bool | None = None

    metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    store: Any = None
    user: Any = None


class Part(Strict):
    type: str
    text: str | None = None
    file: Any = None
    image_url: Any = None
    input_audio: Any = None
    refusal: Any = None


class Function(Strict):
    name: str
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Any = None


class Named(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: Named


class Message(Strict):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    # What answers have and clients send back.
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None


class ChatRequest(Generating):
    messages: list[Message] = Field(min_length=1, max_length=MAX_TURNS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Must be 0.")
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    modalities: list[str] | None = Field(None, description='Must be ["text"].')
    audio: None = None
    functions: None = None
    function_call: None = None
    web_search_options: None = None

    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class CompletionRequest(Generating):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    best_of: int | None = Field(None, ge=1, le=MAX_CANDIDATES, description="Must be n.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5, description="At most 1.")
    suffix: str | None = Field(None, description="Must be absent.")


class EmbeddingRequest(Strict):
    model: Name
    input: (
        str
        | Annotated[list[str], _at_most(MAX_INPUTS)]
        | list[TokenId]
        | Annotated[list[list[TokenId]], _at_most(MAX_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=MAX_INT)
    user: Any = None
