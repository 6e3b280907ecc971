"""`lingqu generate`, `chat` and `embed`."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer

from lingqu.cli.connection import Suite, err, fail, out, run
from lingqu.inference.v1 import inference_pb2 as pb

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_VECTORS = "minilm-l6-v2"

Model = Annotated[str, typer.Option("--model", "-m", help="Name of the model; `lingqu models list`.")]
MaxTokens = Annotated[int | None, typer.Option(help="At most so many tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0: always the likeliest token; up to 2.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens that make up this share.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler.")]


def generate(
    context: typer.Context,
    prompt: Annotated[
        str, typer.Argument(help="The question, or the text to continue; - reads it from stdin.")
    ],
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given often.")] = None,
    schema: Annotated[
        str | None, typer.Option(help="JSON Schema the text has to keep to; @FILE reads it from a file.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression the text has to match.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The text is one of these; may be given often.")
    ] = None,
) -> None:
    """Generate text, shown as it comes.

    Example: lingqu generate "Name three rivers." --max-tokens 40
    Example: lingqu generate "Is water wet?" --choice yes --choice no
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    if raw and system:
        fail("--system needs the chat template: leave out --raw")
    turns = [("system", system)] if system else []
    sampling = _sampling(max_tokens, temperature, top_p, seed, stop or [])
    sampling |= _form(schema, regex, choice or [])
    what = {"prompt": prompt} if raw else {"messages": [*turns, ("user", prompt)]}
    run(_print_stream(context.obj, model, {**what, **sampling}))


def chat(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends."""
    turns = [("system", system)] if system else []
    sampling = _sampling(max_tokens, temperature, top_p, seed, [])
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not question.strip():
            return
        turns.append(("user", question))
        turns.append(("assistant", run(_print_stream(context.obj, model, {"messages": turns, **sampling}))))


def embed(
    context: typer.Context,
    texts: Annotated[list[str], typer.Argument(help="Texts to turn into vectors.")],
    model: Model = DEFAULT_VECTORS,
    dimensions: Annotated[int | None, typer.Option(help="Only the first components, so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All components, as JSON.")] = False,
) -> None:
    """Turn texts into vectors, and show how similar each is to the first (cosine).

    Example: lingqu embed "a canal" "a river" "a keyboard"
    """

    options = {} if dimensions is None else {"dimensions": dimensions}

    async def work(suite: Suite) -> pb.EmbedResponse:
        async with suite.client() as client:
            return await client.embed(model, texts, **options)

    answer = run(work(context.obj))
    vectors = [list(e.values) for e in answer.embeddings]
    if as_json:
        typer.echo(json.dumps(vectors))
        return
    for text, vector in zip(texts, vectors, strict=True):
        out.print(f"{_cosine(vectors[0], vector):6.3f}  {text[:60]}  [dim]({len(vector)} dimensions)[/dim]")


async def _print_stream(suite: Suite, model: str, request: dict[str, Any]) -> str:
    """Print the answer as it comes and return it."""
    text, last = [], None
    begun = asyncio.get_running_loop().time()
    async with suite.client() as client, aclosing(client.stream(model, **request)) as chunks:  # type: ignore[type-var]
        async for last in chunks:
            text.append(last.text)
            sys.stdout.write(last.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    if last is not None and sys.stderr.isatty():
        seconds = asyncio.get_running_loop().time() - begun
        tokens = last.usage.completion_tokens
        reason = pb.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_").lower()
        err.print(
            f"[dim]{model} v{last.model_version} · {last.usage.prompt_tokens} + {tokens} tokens · "
            f"{seconds:.1f} s · {reason}[/dim]"
        )
    return "".join(text)


def _sampling(
    max_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None, stop: list[str]
) -> dict[str, Any]:
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop}
    return {name: value for name, value in given.items() if value not in (None, [])}


def _form(schema: str | None, regex: str | None, choice: list[str]) -> dict[str, Any]:
    if sum(map(bool, (schema, regex, choice))) > 1:
        fail("only one of --schema, --regex and --choice can be given")
    if schema and schema.startswith("@"):
        try:
            schema = Path(schema[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--schema: {error}")
    if schema:
        return {"response_format": pb.ResponseFormat(json_schema=schema)}
    if regex:
        return {"response_format": pb.ResponseFormat(regex=regex)}
    if choice:
        return {"response_format": pb.ResponseFormat(choice=pb.Choice(options=choice))}
    return {}


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return float(dot / ((sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5 or 1))
