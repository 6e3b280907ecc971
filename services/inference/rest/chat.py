"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from lingqu.inference.v1 import inference_pb2 as pb
from services.core.errors import InvalidInput, Unsupported
from services.inference import calls, convert
from services.inference.backends.jobs import Finish
from services.inference.callers import Caller
from services.inference.chat import Call
from services.inference.rest import answers, jobs
from services.inference.rest.answers import Answer, Events, Heading, whole
from services.inference.rest.bodies import dumped, parsed
from services.inference.rest.endpoint import Asked
from services.inference.rest.schemas import ChatRequest, Message, NamedTool, Part, Tool
from services.inference.rest.serving import Models
from services.inference.rest.sse import DONE, Chunks
from services.inference.text import Delta, GenerateJob, Logprob, TextModel

OBJECT = "chat.completion"


@dataclass(frozen=True, slots=True)
class _Run:
    """A request on its way."""

    request: ChatRequest
    job: GenerateJob
    model: TextModel
    heading: Heading
    caller: Caller

    def readers(self) -> list[calls.CallReader]:
        """One for each candidate."""
        names = [tool.name for tool in self.job.tools]
        return [calls.CallReader(names) for _ in range(self.job.n)]


class Chat:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def __call__(self, asked: Asked) -> Answer:
        request = parsed(asked.body, ChatRequest)
        with jobs.openai_names(request, "messages"):
            job = to_job(request)
        model = self._models.text(request.model, asked.headers)
        heading = Heading.new("chatcmpl", request.model, model.key.version)
        caller = asked.caller(jobs.priority(request), stream=bool(request.stream))
        run = _Run(request, job, model, heading, caller)
        return Events(self._events(run)) if request.stream else await self._whole(run)

    async def _whole(self, run: _Run) -> Answer:
        candidates, readers, last = [_Candidate() for _ in range(run.job.n)], run.readers(), Delta("")
        with jobs.openai_names(run.request, "messages"):
            async with aclosing(self._models.generate(run.model, run.job, run.caller)) as deltas:
                async for last in deltas:
                    candidates[last.index].add(*_read(readers, run, last), last)
        return whole(
            {
                **_head(run, OBJECT),
                "choices": [candidate.choice(at, run.request) for at, candidate in enumerate(candidates)],
                "usage": answers.usage_of(last),
            }
        )

    async def _events(self, run: _Run) -> AsyncGenerator[bytes, None]:
        """The first event comes with the first text, so that what is refused before it can be a status."""
        with_usage = jobs.wants_usage(run.request)
        chunks = Chunks(_head(run, f"{OBJECT}.chunk"), with_usage=with_usage)
        readers, last = run.readers(), Delta("")
        begun: set[int] = set()
        called = [0] * run.job.n
        with jobs.openai_names(run.request, "messages"):
            async with aclosing(self._models.generate(run.model, run.job, run.caller)) as deltas:
                async for last in deltas:
                    at = last.index
                    text, found = _read(readers, run, last)
                    first = (
                        b"" if at in begun else chunks.choice(_part(at, {"role": "assistant", "content": ""}))
                    )
                    begun.add(at)
                    said = _said(text, found, called[at])
                    called[at] += len(found)
                    finish = _finish(last, bool(called[at])) if last.finish else None
                    if said or finish or last.logprobs or first:
                        logprobs = _logprobs(last.logprobs) if run.job.logprobs else None
                        yield first + chunks.choice(_part(at, said, finish, logprobs))
        yield (chunks.usage(answers.usage_of(last)) if with_usage else b"") + DONE


def to_job(request: ChatRequest) -> GenerateJob:
    """Raises InvalidInput, naming the field of the text API or OpenAI's parameter."""
    if request.top_logprobs:
        raise Unsupported("top_logprobs", "the engine tells the chosen token's log-probability only: use 0")
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidInput("top_logprobs", "is for logprobs only: set logprobs to true")
    if request.modalities is not None and request.modalities != ["text"]:
        raise Unsupported("modalities", 'answers are text: use ["text"]')
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InvalidInput("max_completion_tokens", "is given together with max_tokens: only one may be")
    fields = jobs.common(request)
    if (most := request.max_completion_tokens or request.max_tokens) is not None:
        fields["max_tokens"] = most
    tools, forced = _tools(request)
    if forced and "response_format" in fields:
        raise InvalidInput("tool_choice", "a forced call and a form of the answer exclude each other")
    job = convert.to_generate_job(
        pb.GenerateRequest(
            **fields,
            messages=_messages(request.messages),
            logprobs=bool(request.logprobs),
            tools=[
                pb.Tool(
                    name=tool.function.name,
                    description=tool.function.description or "",
                    parameters=dumped(f"tools[{at}].parameters", tool.function.parameters)
                    if tool.function.parameters
                    else "",
                )
                for at, tool in enumerate(tools)
            ],
        )
    )
    if not forced:
        return job
    callable_tools = tuple(tool for tool in job.tools if tool.name in forced)
    return replace(job, tools=callable_tools, grammar=calls.forced(callable_tools))


def _tools(request: ChatRequest) -> tuple[list[Tool], set[str]]:
    """The tools, and the names of those of which one must be called."""
    given, choice = list(request.tools or ()), request.tool_choice
    names = {tool.function.name for tool in given}
    if choice is not None and choice != "none" and not given:
        raise InvalidInput("tool_choice", "is for tools only: there are none")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise InvalidInput("tool_choice.function.name", "is not the name of one of the tools")
        return given, {choice.function.name}
    return ([] if choice == "none" else given), names if choice == "required" else set()


def _messages(given: Sequence[Message]) -> list[pb.Message]:
    """The messages that stand for instructions at the beginning become one."""
    made = [_message(at, message) for at, message in enumerate(given)]
    count = next((at for at, message in enumerate(made) if message.role != "system"), len(made))
    if count > 1:
        joined = "\n\n".join(message.content for message in made[:count])
        made[:count] = [pb.Message(role="system", content=joined, name=made[0].name)]
    return made


def _message(at: int, message: Message) -> pb.Message:
    field = f"messages[{at}]"
    content = _content(f"{field}.content", message.content)
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidInput(f"{field}.content", "is required")
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidInput(f"{field}.tool_call_id", "is required")
    return pb.Message(
        role="system" if message.role == "developer" else message.role,
        content=content,
        name=message.name or "",
        tool_call_id=message.tool_call_id or "",
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls or ()
        ],
    )


def _content(field: str, content: str | list[Part] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for at, part in enumerate(content):
        if part.type != "text":
            raise Unsupported(f"{field}[{at}].type", f'"{part.type[:32]}" cannot be read: text only')
        if part.text is None:
            raise InvalidInput(f"{field}[{at}].text", "is required")
    return "\n".join(part.text or "" for part in content)


def _read(readers: list[calls.CallReader], run: _Run, delta: Delta) -> tuple[str, list[Call]]:
    """The text and the calls in a piece."""
    if not run.job.tools:
        return delta.text, []
    reader = readers[delta.index]
    text, found = reader.push(delta.text)
    if delta.finish:
        rest, more = reader.finish()
        text, found = text + rest, found + more
    return text, found


class _Candidate:
    """A choice as it grows."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._calls: list[Call] = []
        self._logprobs: list[Logprob] = []
        self._finish: str | None = None

    def add(self, text: str, found: list[Call], delta: Delta) -> None:
        self._texts.append(text)
        self._calls += found
        self._logprobs += delta.logprobs
        if delta.finish:
            self._finish = _finish(delta, bool(self._calls))

    def choice(self, at: int, request: ChatRequest) -> dict[str, Any]:
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message |= {"content": text.strip() or None, "tool_calls": [_call(call) for call in self._calls]}
        return {
            "index": at,
            "message": message,
            "logprobs": _logprobs(self._logprobs) if request.logprobs else None,
            "finish_reason": self._finish,
        }


def _head(run: _Run, kind: str) -> dict[str, Any]:
    tier = run.request.service_tier
    return run.heading.of(kind) | ({"service_tier": tier} if tier else {})


def _part(
    at: int, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _said(text: str, found: list[Call], before: int) -> dict[str, Any]:
    said: dict[str, Any] = {"content": text} if text else {}
    if found:
        said["tool_calls"] = [{"index": before + at, **_call(call)} for at, call in enumerate(found)]
    return said


def _finish(delta: Delta, called: bool) -> str:
    return "tool_calls" if called and delta.finish is Finish.STOP else answers.FINISH[delta.finish]


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(found: Sequence[Logprob]) -> dict[str, Any]:
    content = [
        {
            "token": answers.token_text(one),
            "logprob": one.logprob,
            "bytes": list(one.bytes),
            "top_logprobs": [],
        }
        for one in found
    ]
    return {"content": content, "refusal": None}
