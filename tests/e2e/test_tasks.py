"""Vectors, labels, answers and tokens through the public port, against what torch computes of the same
checkpoint."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tokenizers import Tokenizer
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from tritonclient.utils import InferenceServerException
from typer.testing import CliRunner

import lingqu
from bench.suite import Suite
from lingqu.cli.main import app
from lingqu.inference.v1 import inference_pb2 as pb
from pipeline.answerer import package_answerer
from pipeline.bundled import TEXT_MODEL, VECTOR_MODEL
from pipeline.package import Package
from services.inference.artifact import GoldenLabels
from tests import checkpoints

LABELS, READER = "sentiment", "reader"
ODD = (
    "a",
    " ",
    "\x00\u200b",
    "👩‍👩‍👧‍👦 שלום",
    "灵渠沟通了湘江和漓江。",
    "cafe\u0301",
    "مرحبا بالعالم",
    "x " * 600,
)
ADA = "Ada lives in Turin and works as a baker."


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.questions(tmp_path_factory.mktemp("checkpoint") / "reader")


@pytest.fixture(scope="session")
async def tasks(
    suite: Suite, classifier: Package, reader: Path, tmp_path_factory: pytest.TempPathFactory
) -> Suite:
    """The suite, with a classifier and a reader that says when a text does not tell."""
    answerer = package_answerer(reader, tmp_path_factory.mktemp("store"), no_answer=True)
    await suite.publish(LABELS, classifier.folder)
    await suite.publish(READER, answerer.folder)
    return suite


@pytest.fixture
async def client(tasks: Suite) -> AsyncIterator[lingqu.Client]:
    async with lingqu.Client(tasks.public, tasks.key) as client:
        yield client


def texts(count: int) -> list[str]:
    """Of many lengths, in words of the training and others."""
    drawn = random.Random(1)
    words = [
        *checkpoints.GOOD,
        *checkpoints.BAD,
        *checkpoints.THINGS,
        "the",
        "was",
        "not",
        "灵渠",
        "😀",
        "rained",
    ]
    return [" ".join(drawn.choices(words, k=drawn.randint(1, 12))) for _ in range(count)]


async def test_labels_are_the_checkpoints(client: lingqu.Client, sentiment: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(sentiment).eval()
    tokenizer = Tokenizer.from_file(str(sentiment / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512)
    inputs = [*ODD, *texts(40)]
    answer = await client.classify(LABELS, inputs)
    read = 0
    for text, result in zip(inputs, answer.results, strict=True):
        ids = tokenizer.encode(text).ids
        read += len(ids)
        with torch.inference_mode():
            expected = torch.softmax(model(torch.tensor([ids])).logits[0], 0)
        scores = {label.name: label.score for label in result.labels}
        assert scores == pytest.approx(
            {model.config.id2label[i]: float(p) for i, p in enumerate(expected)}, abs=1e-3
        )
        assert result.labels[0].score >= result.labels[1].score
        if abs(float(expected[0] - expected[1])) > 2e-3:
            assert result.labels[0].name == model.config.id2label[int(expected.argmax())]
    assert answer.usage.prompt_tokens == read
    sure = await client.classify(LABELS, ["What a wonderful film!", "The meal was disgusting."], top=1)
    assert [[label.name for label in r.labels] for r in sure.results] == [["positive"], ["negative"]]


async def test_thousands_of_texts_and_different_lengths_at_once(client: lingqu.Client) -> None:
    inputs = texts(2048)
    whole, *alone = await asyncio.gather(
        client.classify(LABELS, inputs), *(client.classify(LABELS, [text]) for text in inputs[:32])
    )
    assert len(whole.results) == 2048
    for one, result in zip(alone, whole.results, strict=False):
        assert one.results[0].labels[0].score == pytest.approx(result.labels[0].score, abs=1e-3)


@pytest.mark.parametrize(
    ("question", "context"),
    [
        ("Where does Ada live?", ADA),
        ("What does Ben work as?", "Ben is a doctor in Oslo."),
        ("Where?", "👩🏽‍🚀👩🏽‍🚀 Ada 🏠 lives in İstanbul, the cafe\u0301 \u05e9\u05dc\u05d5\u05dd is 灵渠."),
        ("Where does Emma live?", "Nothing is said. " * 150 + "Emma lives in Kyoto. " + "It rains. " * 250),
        ("Who?", "x"),
    ],
)
async def test_answers_are_the_checkpoints(
    client: lingqu.Client, reader: Path, question: str, context: str
) -> None:
    """Every pair of start and end that the definition allows is tried; the context is cut as transformers
    does."""
    wanted = reference(reader, question, context)
    answer = await client.answer(READER, question, context)
    if wanted is None:
        assert list(answer.answers) == []
        return
    (span,) = answer.answers
    assert span.text == context[span.start : span.end]
    start, end, score = wanted
    assert span.score == pytest.approx(score, abs=1e-3)
    assert (span.start, span.end) in {(start, end), (start, end + 1)}  # with the accent behind it


def reference(folder: Path, question: str, context: str) -> tuple[int, int, float] | None:
    """Start, end and probability by transformers' model, one window after the other."""
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512, stride=128, strategy="only_second")
    first = tokenizer.encode(question, context)
    starts: dict[tuple[int, int], float] = {}
    ends: dict[tuple[int, int], float] = {}
    spans: dict[tuple[int, int], float] = {}
    nulls = []
    for window in [first, *first.overflowing]:
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([window.ids]), token_type_ids=torch.tensor([window.type_ids])
            )
        s, e = output.start_logits[0].double().numpy(), output.end_logits[0].double().numpy()
        nulls.append((s[0], e[0]))
        at = [i for i, sequence in enumerate(window.sequence_ids) if sequence == 1]
        for i in at:
            place = window.offsets[i]
            starts[place] = max(s[i], starts.get(place, -np.inf))
            ends[place] = max(e[i], ends.get(place, -np.inf))
            for j in range(i, min(i + 32, at[-1] + 1)):
                key = (place[0], window.offsets[j][1])
                spans[key] = max(s[i] + e[j], spans.get(key, -np.inf))
    null = min(nulls, key=sum)
    best = max(spans, key=spans.__getitem__)
    if sum(null) > spans[best]:
        return None
    total = np.logaddexp.reduce([*starts.values(), null[0]]) + np.logaddexp.reduce([*ends.values(), null[1]])
    return *best, float(np.exp(spans[best] - total))


async def test_what_the_text_does_not_tell_is_no_answer(client: lingqu.Client) -> None:
    assert not (await client.answer(READER, "How old is Ada?", ADA)).answers
    assert (await client.answer(READER, "What does Ada work as?", ADA)).answers[0].text == "baker"


async def test_answers_do_not_overlap_and_come_best_first(client: lingqu.Client) -> None:
    answer = await client.answer(READER, "What does Ada work as?", ADA, top=20, max_answer_tokens=1)
    assert 1 < len(answer.answers) <= 20
    scores = [span.score for span in answer.answers]
    assert scores == sorted(scores, reverse=True)
    places = sorted((span.start, span.end) for span in answer.answers)
    assert all(one[1] <= other[0] for one, other in pairwise(places))
    assert all(" " not in span.text for span in answer.answers)


async def test_dimensions_and_normalisation(client: lingqu.Client) -> None:
    whole = np.array((await client.embed(VECTOR_MODEL, ["a canal"])).embeddings[0].values)
    for dimensions in (1, 64, 384):
        cut = np.array(
            (await client.embed(VECTOR_MODEL, ["a canal"], dimensions=dimensions)).embeddings[0].values
        )
        head = whole[:dimensions]
        assert np.allclose(cut, head / np.linalg.norm(head), atol=1e-5)
    plain = await client.embed(VECTOR_MODEL, ["a canal"], dimensions=64, normalize=False)
    assert np.allclose(plain.embeddings[0].values, whole[:64], atol=1e-6)
    for dimensions in (0, 385):
        with pytest.raises(lingqu.LingquError) as caught:
            await client.embed(VECTOR_MODEL, ["a canal"], dimensions=dimensions)
        assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "dimensions")


async def test_numbers_at_their_bounds_are_taken_and_others_named(client: lingqu.Client) -> None:
    for top, labels in ((1, 1), (2, 2), (2**31 - 1, 2)):
        assert len((await client.classify(LABELS, ["fine"], top=top)).results[0].labels) == labels
    for top, tokens in ((1, 1), (20, 512)):
        answer = await client.answer(READER, "Where does Ada live?", ADA, top=top, max_answer_tokens=tokens)
        assert 1 <= len(answer.answers) <= top
        assert all(len(span.text.split()) <= tokens for span in answer.answers)
    refused = [
        (client.classify(LABELS, ["fine"], top=0), "top"),
        (client.classify(LABELS, ["fine"], top=-1), "top"),
        (client.answer(READER, "Where?", ADA, top=0), "top"),
        (client.answer(READER, "Where?", ADA, top=21), "top"),
        (client.answer(READER, "Where?", ADA, max_answer_tokens=0), "max_answer_tokens"),
        (client.answer(READER, "Where?", ADA, max_answer_tokens=513), "max_answer_tokens"),
    ]
    for call, field in refused:
        with pytest.raises(lingqu.LingquError) as caught:
            await call
        assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_megabyte_is_cut_or_refused(client: lingqu.Client) -> None:
    text = "word " * 209_715
    cut = await client.classify(LABELS, [text])
    assert cut.usage.prompt_tokens == 512
    ended = await client.classify(LABELS, [text], truncation=pb.TRUNCATION_START)
    assert ended.usage.prompt_tokens == 512
    with pytest.raises(lingqu.LingquError, match="209717 tokens") as caught:
        await client.classify(LABELS, ["short", text], truncation=pb.TRUNCATION_REFUSE)
    assert caught.value.field == "inputs[1]"


async def test_a_question_too_long_is_named(client: lingqu.Client) -> None:
    with pytest.raises(lingqu.LingquError, match="256 tokens") as caught:
        await client.answer(READER, "word " * 256, ADA)
    assert caught.value.field == "question"
    assert await client.answer(READER, "word " * 255, ADA)


@pytest.mark.parametrize("text", ODD)
async def test_tokens_are_the_tokenizers(
    client: lingqu.Client, tokenizer: Tokenizer, artifacts: dict[str, Path], text: str
) -> None:
    expected = tokenizer.encode(text)
    answer = await client.tokenize(TEXT_MODEL, text)
    assert (list(answer.token_ids), list(answer.tokens)) == (expected.ids, expected.tokens)
    assert answer.max_tokens > 512
    vectors = await client.tokenize(VECTOR_MODEL, text)
    assert vectors.max_tokens == 256
    plain = Tokenizer.from_file(str(artifacts[VECTOR_MODEL] / "tokenizer.json"))
    assert list(vectors.token_ids) == plain.encode(text).ids


async def test_a_chat_is_counted_as_it_will_be(client: lingqu.Client) -> None:
    messages = [("system", "Be brief."), ("user", "Hello, 灵渠!")]
    counted = await client.tokenize(TEXT_MODEL, messages=messages)
    answer = await client.generate(TEXT_MODEL, messages=messages, max_tokens=1)
    assert len(counted.token_ids) == answer.usage.prompt_tokens
    with pytest.raises(lingqu.LingquError) as caught:
        await client.tokenize(LABELS, messages=messages)
    assert (caught.value.reason, caught.value.field) == ("UNSUPPORTED", "messages")


async def test_a_model_of_another_task_says_so(client: lingqu.Client) -> None:
    calls: list[Any] = [
        client.embed(LABELS, ["x"]),
        client.classify(VECTOR_MODEL, ["x"]),
        client.classify(READER, ["x"]),
        client.answer(LABELS, "q", "c"),
        client.answer(TEXT_MODEL, "q", "c"),
        client.generate(READER, "x"),
    ]
    for call in calls:
        with pytest.raises(lingqu.LingquError) as caught:
            await call
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "WRONG_TASK")


async def test_a_deadline_is_kept(tasks: Suite) -> None:
    """Two thousand long texts take longer than that; what waits in Triton is given up, too."""
    async with lingqu.Client(tasks.public, tasks.key, timeout=0.3) as hurried:
        with pytest.raises(lingqu.LingquError) as caught:
            await hurried.classify(LABELS, [f"{n} {'word ' * 400}" for n in range(2000)])
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    async with lingqu.Client(tasks.public, tasks.key, timeout=10) as next_one:
        assert (await next_one.classify(LABELS, ["short"])).results


def test_tensor_clients_get_logits_and_are_told_what_is_wrong(tasks: Suite) -> None:
    headers = {"authorization": f"Bearer {tasks.key}"}

    def infer(model: str, **values: Any) -> Any:
        inputs = []
        for name, value in values.items():
            inputs.append(triton.InferInput(name, list(np.shape(value)), "INT64"))
            inputs[-1].set_data_from_numpy(np.array(value, np.int64))
        with triton.InferenceServerClient(tasks.public) as client:
            return client.infer(model, inputs, headers=headers)

    row = [[101, 7592, 102, 0]]
    mask = [[1, 1, 1, 0]]
    padded = infer(LABELS, input_ids=row, attention_mask=mask).as_numpy("logits")
    alone = infer(LABELS, input_ids=[row[0][:3]], attention_mask=[mask[0][:3]]).as_numpy("logits")
    assert padded.shape == (1, 2)
    assert np.allclose(padded, alone, atol=1e-4)
    answer = infer(READER, input_ids=row, attention_mask=mask, token_type_ids=[[0, 1, 1, 0]])
    assert answer.as_numpy("start_logits").shape == answer.as_numpy("end_logits").shape == (1, 4)
    assert answer.as_numpy("end_logits")[0, 3] < -1e30  # padding is never an answer
    # The same bytes in another shape are other texts.
    two = infer(LABELS, input_ids=[[101, 102], [101, 102]], attention_mask=[[1, 1], [1, 1]])
    assert two.as_numpy("logits").shape == (2, 2)
    one = infer(LABELS, input_ids=[[101, 102, 101, 102]], attention_mask=[[1, 1, 1, 1]])
    assert one.as_numpy("logits").shape == (1, 2)
    for bad in ([[101, -1]], [[101, 2]]):
        with pytest.raises(InferenceServerException) as caught:
            infer(READER, input_ids=[[101, 102]], attention_mask=[[1, 1]], token_type_ids=bad)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_a_version_with_other_labels_than_it_claims_is_refused(
    tasks: Suite, classifier: Package, sentiment: Path, tmp_path: Path
) -> None:
    """Golden labels are computed anew by whoever loads it."""
    from pipeline.package import digests, seal, staging_folder

    staging = staging_folder(tmp_path)
    for file in classifier.manifest.files:
        (staging / file).write_bytes((classifier.folder / file).read_bytes())
    wrong = GoldenLabels(text="What a wonderful film!", scores=(0.9, 0.1))
    manifest = classifier.manifest.model_copy(update={"golden_labels": (wrong,), "files": digests(staging)})
    package = seal(staging, manifest, tmp_path)
    with pytest.raises(lingqu.publishing.PublishFailed, match='label "positive", not "negative"'):
        await tasks.publish("impostor-labels", package.folder)
    with triton.InferenceServerClient(tasks.public) as client:
        assert client.is_server_ready(headers={"authorization": f"Bearer {tasks.key}"})


async def test_the_commands(tasks: Suite, tmp_path: Path) -> None:
    file = tmp_path / "context.txt"
    file.write_text(ADA)
    commands = {
        ("classify", LABELS, "What a wonderful film!", "--top", "1"): "positive",
        ("answer", READER, "--question", "What does Ada work as?", ADA): "baker",
        ("answer", READER, "-q", "What does Ada work as?", "--file", str(file)): "baker",
        ("answer", READER, "-q", "How old is Ada?", ADA): "the text does not tell",
        ("tokenize", VECTOR_MODEL, "a canal"): "4 tokens",
    }

    def invoke(arguments: tuple[str, ...], stdin: str | None = None) -> Any:
        return CliRunner().invoke(app, ["--state", str(tasks.layout.state), *arguments], input=stdin)

    for arguments, expected in commands.items():
        done = await asyncio.to_thread(invoke, arguments)
        assert done.exit_code == 0, done.output
        assert expected in done.output, (arguments, done.output)
    piped = ("answer", READER, "-q", "What does Ada work as?", "-", "--output", "json")
    done = await asyncio.to_thread(invoke, piped, ADA)
    assert json.loads(done.output)["answers"][0]["text"] == "baker"
    failed = await asyncio.to_thread(invoke, ("answer", READER, "-q", "x"))
    assert failed.exit_code == 1
