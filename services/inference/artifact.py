"""A model's artifact: a folder with a manifest.json that describes the model and has the digest of every
file. The manifest's own SHA-256 is the artifact's; it names one exact model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MANIFEST = "manifest.json"
CHUNK = 1 << 20

# Relative and without a leading dot anywhere, so that nothing climbs out of the folder.
_SEGMENT = "[A-Za-z0-9_-][A-Za-z0-9._-]*"
FilePath = Annotated[str, StringConstraints(pattern=f"^{_SEGMENT}(/{_SEGMENT})*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Value):
    sha256: Sha256
    size: int = Field(ge=0)


class TextSpec(_Value):
    """A text model: `weights` is its file, `context_tokens` bounds prompt and answer together."""

    weights: FilePath
    context_tokens: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    eos_token_ids: tuple[int, ...]


class VectorSpec(_Value):
    """A vector model. Its ONNX graph maps input_ids and attention_mask, INT64 [batch, tokens], to
    `embedding`, FP32 [batch, dimensions]: pooling and normalisation are inside."""

    weights: FilePath
    max_tokens: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    dimensions: int = Field(ge=1)


class TensorSpec(_Value):
    """Any model for Triton's Python backend: `config` is its config.pbtxt, `model` its model.py."""

    config: FilePath
    model: FilePath


class GoldenText(_Value):
    prompt: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class GoldenVector(_Value):
    text: str
    vector: tuple[float, ...]


class Manifest(_Value):
    """What is in an artifact. Exactly the part that fits `task` is set."""

    schema_version: Literal[1] = 1
    task: Literal["generate", "embed", "tensor"]
    runtime: Literal["openvino-genai", "onnxruntime", "python"]
    files: dict[FilePath, FileDigest]
    text: TextSpec | None = None
    vector: VectorSpec | None = None
    tensor: TensorSpec | None = None
    golden_texts: tuple[GoldenText, ...] = ()
    golden_vectors: tuple[GoldenVector, ...] = ()

    @model_validator(mode="after")
    def _described(self) -> Self:
        parts = {"generate": self.text, "embed": self.vector, "tensor": self.tensor}
        if [task for task, part in parts.items() if part is not None] != [self.task]:
            raise ValueError(f'a manifest for "{self.task}" has the part for it and no other')
        return self

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        return cls.model_validate_json((folder / MANIFEST).read_bytes())

    @property
    def size_bytes(self) -> int:
        return sum(f.size for f in self.files.values())


def digest_file(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()
