"""A model's artifact: a folder with a manifest.json that describes the model and has the digest of every
file. The manifest's own SHA-256 is the artifact's; it names one exact model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from packaging.specifiers import SpecifierSet
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    model_validator,
)

from services.core.discovery import Version

MANIFEST = "manifest.json"
CHUNK = 1 << 20
MAX_MANIFEST = 64 << 20
"""Bytes; golden vectors are most of a manifest."""

# Relative and without a leading dot anywhere, so that nothing climbs out of the folder and the store's own
# files are never meant; short enough for every file system.
_SEGMENT = "[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
FilePath = Annotated[str, StringConstraints(pattern=f"^{_SEGMENT}(/{_SEGMENT})*$", max_length=512)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@-]{0,62}$")]
Short = Annotated[str, StringConstraints(max_length=256)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
    "BF16", "BYTES",
]  # fmt: skip


def _specifier(value: str) -> str:
    SpecifierSet(value)  # its InvalidSpecifier is a ValueError with a good text
    return value


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Value):
    sha256: Sha256
    size: int = Field(ge=0, le=1 << 50)


class Architecture(_Value):
    """What a transformer decoder's memory follows from: `kv_heads` heads of `head_dim` are kept of every
    token in each layer."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)


class TextSpec(_Value):
    """A text model: `weights` is its GGUF file, the openvino_model.xml in the folder that OpenVINO opens, or
    the safetensors (or their index) of a checkpoint; `context_tokens` bounds prompt and answer together.
    `grammar` is a tiny model with the same vocabulary, by which grammars are tried; without it the model
    takes none. `guesses`: so many tokens a step are guessed at most for a greedy stream that is alone, which
    takes memory for packed weights once more, or three times where they are small (sizing.py); 0: none. Only
    an openvino_model.xml can be guessed for."""

    weights: FilePath
    context_tokens: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    eos_token_ids: tuple[int, ...]
    precision: Literal["fp16", "int8", "int4"] = "fp16"
    grammar: FilePath | None = None
    guesses: int = Field(default=0, ge=0, le=16)
    architecture: Architecture | None = None

    @model_validator(mode="after")
    def _graph(self) -> Self:
        if self.guesses and not self.weights.endswith(".xml"):
            raise ValueError("guesses need an openvino_model.xml")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.weights, *([self.grammar] if self.grammar else []))


class EncoderSpec(_Value):
    """What reads a text once and answers: an ONNX graph over input_ids and attention_mask, INT64 [batch,
    tokens]."""

    weights: FilePath
    max_tokens: int = Field(ge=1)
    vocabulary: int = Field(ge=1)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.weights,)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""
        return ("input_ids", "attention_mask")

    @property
    def outputs(self) -> dict[str, int]:
        """The graph's outputs, FP32, and how many components each has a text; -1: one a token."""
        raise NotImplementedError


class VectorSpec(EncoderSpec):
    """A vector model: `embedding`, FP32 [batch, dimensions]; pooling and normalisation are in the graph.
    `normalized`: its vectors have unit length."""

    dimensions: int = Field(ge=1)
    normalized: bool = True

    @property
    def outputs(self) -> dict[str, int]:
        return {"embedding": self.dimensions}


class ClassifierSpec(EncoderSpec):
    """A classifier: `logits`, FP32 [batch, labels], in the order of `labels`. `multi_label`: each label has a
    probability of its own (sigmoid); otherwise they share one (softmax)."""

    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=4096)]
    multi_label: bool = False

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("two labels have the same name")
        return self

    @property
    def outputs(self) -> dict[str, int]:
        return {"logits": len(self.labels)}


class AnswererSpec(EncoderSpec):
    """Extractive question answering: `start_logits` and `end_logits`, FP32 [batch, tokens], over a question
    and a context. `token_types`: the graph also takes token_type_ids, 1 for the context. `no_answer`: it was
    trained to choose its first token where there is no answer. A longer context is read in windows of which
    two neighbours share `stride` tokens."""

    max_tokens: int = Field(ge=32)
    token_types: bool = False
    no_answer: bool = False
    stride: int = Field(default=128, ge=1)

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs, "token_type_ids") if self.token_types else super().inputs

    @property
    def outputs(self) -> dict[str, int]:
        return {"start_logits": -1, "end_logits": -1}


class TensorSpec(_Value):
    """Any model for Triton's Python backend: `config` is its config.pbtxt, `model` its model.py."""

    config: FilePath
    model: FilePath

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.config, self.model)


class GoldenText(_Value):
    prompt: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class GoldenVector(_Value):
    text: str
    vector: tuple[FiniteFloat, ...]


class LatencyBudget(_Value):
    """What the golden examples may take on the machine that serves them, milliseconds; 0: no bound. Of a text
    model the first token and each one after it, of others a whole request. Measured alone and warmed up, the
    best of a few."""

    first_token_ms: FiniteFloat = Field(0.0, ge=0)
    per_token_ms: FiniteFloat = Field(0.0, ge=0)
    request_ms: FiniteFloat = Field(0.0, ge=0)


class GoldenLabels(_Value):
    """`scores`: probabilities in the order of the labels."""

    text: str
    scores: tuple[FiniteFloat, ...]


class GoldenAnswer(_Value):
    """The best answer, in characters of the context; empty, from 0 to 0, where there is none."""

    question: str
    context: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    score: FiniteFloat


class Requirements(_Value):
    """`engine`: versions of the runtime, PEP 440; `fingerprint`: the only kind of machine. Empty: any."""

    engine: Annotated[Short, AfterValidator(_specifier)] = ""
    fingerprint: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{0,200}$")] = ""


class TensorSignature(_Value):
    """A tensor of the Open Inference Protocol; the shape has the batch, and -1 for what varies."""

    name: Annotated[Short, StringConstraints(min_length=1)]
    datatype: Datatype
    shape: Annotated[tuple[Annotated[int, Field(ge=-1, lt=1 << 63)], ...], Field(max_length=32)] = ()


class Signature(_Value):
    """Inputs and outputs."""

    inputs: Annotated[tuple[TensorSignature, ...], Field(max_length=256)] = ()
    outputs: Annotated[tuple[TensorSignature, ...], Field(max_length=256)] = ()


class Lineage(_Value):
    """Where it comes from: a version or a base model, a run, training data, the code."""

    parent: Short = ""
    training_run: Short = ""
    data_sha256: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = ""
    source: Short = ""


Evaluation = Annotated[dict[Name, FiniteFloat], Field(max_length=64)]
Labels = Annotated[dict[Name, Short], Field(max_length=32)]


class InvalidManifest(ValueError):
    """What should be a manifest is none; the text names the field."""


class Manifest(_Value):
    """What is in an artifact, and what is known of it. Exactly the part that fits `task` is set."""

    schema_version: Literal[1] = 1
    task: Literal["generate", "embed", "classify", "answer", "tensor"]
    runtime: Literal["openvino-genai", "onnxruntime", "openvino", "tensorrt", "tensorrt-llm", "python"]
    files: dict[FilePath, FileDigest] = Field(max_length=4096)
    text: TextSpec | None = None
    vector: VectorSpec | None = None
    classifier: ClassifierSpec | None = None
    answerer: AnswererSpec | None = None
    tensor: TensorSpec | None = None
    golden_texts: tuple[GoldenText, ...] = ()
    golden_vectors: tuple[GoldenVector, ...] = ()
    latency_budget: LatencyBudget = LatencyBudget()
    golden_labels: tuple[GoldenLabels, ...] = ()
    golden_answers: tuple[GoldenAnswer, ...] = ()
    requirements: Requirements = Requirements()
    signature: Signature = Signature()
    evaluation: Evaluation = {}
    lineage: Lineage = Lineage()
    labels: Labels = {}

    @model_validator(mode="after")
    def _described(self) -> Self:
        if [task for task, part in self._parts.items() if part is not None] != [self.task]:
            raise ValueError(f'a manifest for "{self.task}" has the part for it and no other')
        return self

    @model_validator(mode="after")
    def _one_tree(self) -> Self:
        if MANIFEST in self.files:
            raise ValueError(f"{MANIFEST} cannot be one of its own files")
        for name in self.files:
            parts = name.split("/")
            if any("/".join(parts[:end]) in self.files for end in range(1, len(parts))):
                raise ValueError(f"{name} is in a folder that is a file")
        for part in self._parts.values():
            for name in part.paths if part else ():
                if name not in self.files:
                    raise ValueError(f"{name} is not among the files")
        return self

    @classmethod
    def parse(cls, raw: bytes) -> Manifest:
        """Raises InvalidManifest, whatever the bytes are."""
        if len(raw) > MAX_MANIFEST:
            raise InvalidManifest(f"more than {MAX_MANIFEST} bytes")
        try:
            return cls.model_validate_json(raw)
        except ValidationError as err:
            problem = err.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part)[:80] for part in problem["loc"])
            raise InvalidManifest(f"{where}: {problem['msg']}" if where else problem["msg"]) from err

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises InvalidManifest, OSError."""
        return cls.parse((folder / MANIFEST).read_bytes())

    @property
    def _parts(self) -> dict[str, TextSpec | EncoderSpec | TensorSpec | None]:
        """By task."""
        return {
            "generate": self.text,
            "embed": self.vector,
            "classify": self.classifier,
            "answer": self.answerer,
            "tensor": self.tensor,
        }

    @property
    def encoder(self) -> EncoderSpec | None:
        """Of an encoder, whatever its task."""
        return self.vector or self.classifier or self.answerer

    @property
    def size_bytes(self) -> int:
        return sum(f.size for f in self.files.values())

    @property
    def golden_examples(self) -> int:
        every = (self.golden_texts, self.golden_vectors, self.golden_labels, self.golden_answers)
        return sum(map(len, every))


def unlike(record: Version, manifest: Manifest) -> str | None:
    """What a version's record claims and its artifact does not bear out; None if there is nothing. Releases
    are decided by the record, and a signature covers the artifact only."""
    for name in ("task", "runtime"):
        if (claimed := getattr(record, name)) != (found := getattr(manifest, name)):
            return f'its {name} is "{found}", not "{claimed}"'
    if record.golden_examples > manifest.golden_examples:
        return f"it has {manifest.golden_examples} golden examples, not {record.golden_examples}"
    for name, value in record.evaluation.items():
        if manifest.evaluation.get(name) != value:
            return f"its evaluation does not have {name} = {value:g}"
    return None


def digest_file(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()
