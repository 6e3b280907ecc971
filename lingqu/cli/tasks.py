"""`lingqu classify`, `answer`, `score` and `tokenize`."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape

from lingqu.cli.connection import Suite, fail, out, run
from lingqu.cli.output import Format, Output, as_json, table
from lingqu.client import Client

T = TypeVar("T")
Name = Annotated[str, typer.Argument(help="Name of the model; `lingqu models list`.")]


def classify(
    context: typer.Context,
    model: Name,
    texts: Annotated[list[str], typer.Argument(help="Texts to label.")],
    top: Annotated[int | None, typer.Option(help="Only so many of the best labels.")] = None,
    output: Output = Format.table,
) -> None:
    """Label texts, with the probability of each label.

    Example: lingqu classify sentiment "What a day!" "It rained." --top 1
    """
    options = {} if top is None else {"top": top}
    answer = _called(context.obj, lambda client: client.classify(model, texts, **options))
    if output == Format.json:
        as_json(answer)
        return
    rows = [
        (text[:60], label.name, f"{label.score:.3f}")
        for text, result in zip(texts, answer.results, strict=True)
        for label in result.labels
    ]
    table(("text", "label", "score"), rows, "no labels")


def answer(
    context: typer.Context,
    model: Name,
    text: Annotated[str, typer.Argument(help="The text that has the answer; - reads it from stdin.")] = "",
    question: Annotated[str, typer.Option("--question", "-q", help="What is asked.")] = ...,  # type: ignore[assignment]
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", exists=True, dir_okay=False, help="The text is in this file."),
    ] = None,
    top: Annotated[int | None, typer.Option(help="So many answers at most.")] = None,
    output: Output = Format.table,
) -> None:
    """Find the answer to a question in a text.

    Example: lingqu answer reader --question "Where does Ada live?" "Ada lives in Turin."
    """
    if bool(text) == (file is not None):
        fail("give the text as an argument, or - for stdin, or --file")
    try:
        read = file.read_text() if file else sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        fail(f"the text is not UTF-8: {error}")
    options = {} if top is None else {"top": top}
    found = _called(context.obj, lambda client: client.answer(model, question, read, **options))
    if output == Format.json:
        as_json(found)
        return
    rows = [(span.text, f"{span.score:.3f}", f"{span.start}–{span.end}") for span in found.answers]
    table(("answer", "score", "characters"), rows, "the text does not tell")


def score(
    context: typer.Context,
    model: Name,
    texts: Annotated[list[str], typer.Argument(help="Texts whose likelihood is wanted.")],
    prefix: Annotated[str, typer.Option(help="What comes before each text and is not scored itself.")] = "",
    output: Output = Format.table,
) -> None:
    """How likely a text model finds texts: log-likelihood and perplexity.

    Example: lingqu score smollm2-135m-instruct --prefix "The capital of France is" " Paris." " Rome."
    """
    found = _called(context.obj, lambda client: client.score(model, texts, prefix=prefix))
    if output == Format.json:
        as_json(found)
        return
    rows = [
        (text[:60], f"{one.log_likelihood:.3f}", f"{one.perplexity:.2f}", str(one.scored_tokens))
        for text, one in zip(texts, found.scores, strict=True)
    ]
    table(("text", "log-likelihood", "perplexity", "tokens"), rows, "no texts")


def tokenize(
    context: typer.Context,
    model: Name,
    text: Annotated[str, typer.Argument(help="The text to split; - reads it from stdin.")],
    chat: Annotated[bool, typer.Option(help="As a question in a chat, with the model's template.")] = False,
    output: Output = Format.table,
) -> None:
    """Split a text into a model's tokens, and count them.

    Example: lingqu tokenize smollm2-135m-instruct "A canal joins two rivers."
    """
    text = sys.stdin.read() if text == "-" else text
    what = {"messages": [("user", text)]} if chat else {"text": text}
    found = _called(context.obj, lambda client: client.tokenize(model, **what))
    if output == Format.json:
        as_json(found)
        return
    out.print(" ".join(escape(token) for token in found.tokens))
    out.print(f"[dim]{len(found.token_ids)} tokens; {model} reads {found.max_tokens} at most[/dim]")


def _called(suite: Suite, call: Callable[[Client], Awaitable[T]]) -> T:
    async def work() -> T:
        async with suite.client() as client:
            return await call(client)

    return run(work())
