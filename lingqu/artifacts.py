"""An artifact as the registry records it: found in a folder, pushed into a store, signed.

Needs nothing but the client's own packages; pushing and signing need `lingqu[publish]`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from google.protobuf import json_format

from lingqu.registry.v1 import models_pb2

if TYPE_CHECKING:
    from services.core.signing import Signer

MANIFEST = "manifest.json"
# Parts of a manifest that are called the same in the registry's record, and have the same form.
RECORDED = ("labels", "requirements", "signature", "evaluation", "lineage")
LOCAL = "file://"


class PublishFailed(Exception):
    """The version was refused or no replica got it ready; the text has the reason."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What the registry needs to know of an artifact. `about` holds its manifest's RECORDED parts."""

    uri: str
    sha256: str
    size_bytes: int
    task: str
    runtime: str
    golden_examples: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    signature: bytes = b""
    signer: str = ""

    @classmethod
    def at(cls, folder: Path) -> Artifact:
        """Raises PublishFailed if `folder` is no artifact, or not intact."""
        try:
            raw = (folder / MANIFEST).read_bytes()
            for name, file in json.loads(raw)["files"].items():
                if (found := _digest(folder / name)) != file["sha256"]:
                    raise PublishFailed(
                        f"{folder / name} is corrupt: its SHA-256 is {found}, not {file['sha256']}"
                    )
            return cls._described(f"{LOCAL}{folder.resolve()}", raw)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, json_format.ParseError) as err:
            _no_artifact(folder, err)

    @classmethod
    def stored(cls, uri: str) -> Artifact:
        """The artifact that was pushed to `uri`; its files are verified by who loads them. Raises
        PublishFailed."""
        try:
            from services.inference.transfer import filesystem, reason
        except ImportError as err:
            _not_installed(err)
        try:
            fs, base = filesystem(uri)
            raw = fs.cat_file(f"{base}/{MANIFEST}")
        except Exception as err:  # each file system has errors of its own
            raise PublishFailed(f"{uri}/{MANIFEST} cannot be read: {reason(err)}") from err
        try:
            return cls._described(uri.rstrip("/"), raw)
        except (ValueError, LookupError, TypeError, AttributeError, json_format.ParseError) as err:
            _no_artifact(uri, err)

    @classmethod
    def _described(cls, uri: str, raw: bytes) -> Artifact:
        body = json.loads(raw)
        artifact = cls(
            uri,
            hashlib.sha256(raw).hexdigest(),
            sum(int(file["size"]) for file in body["files"].values()),
            body["task"],
            body["runtime"],
            sum(len(found) for part, found in body.items() if part.startswith("golden_")),
            {part: body[part] for part in RECORDED if part in body},
        )
        artifact.record("")  # proves that it can be recorded
        return artifact

    def push(self, store: str, progress: Callable[[int, int], None] | None = None) -> Artifact:
        """The same artifact at its place in the store at this URI, once it is there: s3://…, gs://…, file://…
        `progress` is told the bytes in place and the bytes in all. Raises PublishFailed."""
        try:
            from services.inference.push import PushFailed, push
        except ImportError as err:
            _not_installed(err)
        if not self.uri.startswith(LOCAL):
            raise PublishFailed(f"{self.uri} is not on this machine, so it cannot be pushed from here")
        try:
            return replace(self, uri=push(Path(self.uri.removeprefix(LOCAL)), store, progress))
        except PushFailed as err:
            raise PublishFailed(str(err)) from err

    def signed(self, signer: Signer, model: str) -> Artifact:
        """With `signer`'s word that this is a version of `model`; it holds for no other model."""
        return replace(self, signature=signer.sign(model, self.sha256), signer=signer.id)

    def record(self, model: str) -> models_pb2.ModelVersion:
        """What CreateModelVersion takes."""
        record = models_pb2.ModelVersion(
            model=model,
            artifact=models_pb2.Artifact(
                uri=self.uri,
                sha256=self.sha256,
                size_bytes=self.size_bytes,
                signature=self.signature,
                signer=self.signer,
            ),
            task=self.task,
            runtime=self.runtime,
            golden_examples=self.golden_examples,
        )
        json_format.ParseDict(dict(self.about), record)
        return record


def _no_artifact(where: Path | str, err: Exception) -> NoReturn:
    raise PublishFailed(
        f"{where} is no artifact ({err}); `python -m pipeline --help` shows how to make one"
    ) from err


def _not_installed(err: ImportError) -> NoReturn:
    raise PublishFailed(f"{err.name} is not installed; stores need: pip install 'lingqu[publish]'") from err


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
