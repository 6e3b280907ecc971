"""Settings are a value: read from the environment once, in `__main__`, and validated as a whole."""

from __future__ import annotations

import re
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, PlainValidator, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.core.signing import TrustedKeys
from services.core.tls import Identity

_ADDRESS = re.compile(r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})$")

_ORIGIN = re.compile(r"^https?://[A-Za-z0-9.*-]+(:\d{1,5})?$")


def _address(value: str) -> str:
    match = _ADDRESS.match(value)
    if not match or int(match[2]) > 65535:
        raise ValueError(f'"{value}" is not host:port')
    return value


def _addresses(value: str) -> str:
    return ",".join(_address(part.strip()) for part in value.split(","))


Address = Annotated[str, AfterValidator(_address)]
Addresses = Annotated[str, AfterValidator(_addresses)]
"""One or several addresses of the same thing, separated by commas."""


def is_loopback(address: str) -> bool:
    """Of "host:port": whether only this machine reaches it."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _loopback(value: str) -> str:
    if not is_loopback(value):
        raise ValueError(f'"{value}" is not on loopback, and whoever reached it could write there')
    return value


Loopback = Annotated[Address, AfterValidator(_loopback)]


def _labels(value: object) -> object:
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not key.strip() or not sign for key, sign, _ in pairs):
        raise ValueError(f'"{value}" is not like "zone=a,gpu=l4"')
    return {key.strip(): found.strip() for key, _, found in pairs}


Labels = Annotated[dict[str, str], NoDecode, BeforeValidator(_labels)]


def _origins(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = tuple(part.strip() for part in value.split(",") if part.strip())
    for origin in found:
        if not _ORIGIN.match(origin):
            raise ValueError(f'"{origin}" is not like "https://app.example" or "https://*.example:8443"')
    return found


Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]
"""Origins of web pages, separated by commas; "*" in one stands for any text without "/"."""


def _trusted(value: object) -> TrustedKeys | None:
    return TrustedKeys.at(Path(value)) if isinstance(value, str) and value else None


Trusted = Annotated[TrustedKeys | None, PlainValidator(_trusted)]
"""A path of public keys, read at once, so that a mistake in it ends the start; empty: None."""


class Settings(BaseSettings):
    """What every service reads. Each field is the environment variable LINGQU_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="LINGQU_", frozen=True, extra="ignore")

    log_level: str = "INFO"
    otlp_endpoint: str = ""
    """host:port of an OTLP/gRPC collector for spans and figures; empty: no spans are exported."""
    metrics: str = ""
    """host:port of the metrics service: it gets figures if otlp_endpoint is empty, and what Envoy tells of
    every request always; empty: nobody is told."""
    grace_s: float = 5.0
    """How long running calls may go on after a stop was asked for."""
    max_in_flight: int = 4096
    mtls_certificate: Path | None = None
    """Who this part is to the others: PEM files of its certificate, its key, and the CA of all parts. None of
    them: connections between parts are plain."""
    mtls_key: Path | None = None
    mtls_ca: Path | None = None

    @model_validator(mode="after")
    def _whole_identity(self) -> Self:
        if len({found is None for found in (self.mtls_certificate, self.mtls_key, self.mtls_ca)}) > 1:
            raise ValueError("LINGQU_MTLS_CERTIFICATE, LINGQU_MTLS_KEY and LINGQU_MTLS_CA go together")
        return self

    @property
    def identity(self) -> Identity | None:
        if self.mtls_certificate is None or self.mtls_key is None or self.mtls_ca is None:
            return None
        return Identity(self.mtls_certificate, self.mtls_key, self.mtls_ca)

    @property
    def collector(self) -> tuple[str, Identity | None]:
        """Who gets figures, and who this part is there: an outside collector knows no parts."""
        return (self.otlp_endpoint, None) if self.otlp_endpoint else (self.metrics, self.identity)

    audit_log: Path | None = None
    """File for lines about administrative acts (audit.py); unset: none are written."""


S = TypeVar("S", bound=Settings)


def load(kind: type[S]) -> S:
    """Read the environment; on any mistake, name every wrong variable and end the process with code 2."""
    try:
        return kind()
    except ValidationError as error:
        for problem in error.errors():
            name = "LINGQU_" + "_".join(str(part) for part in problem["loc"]).upper()
            sys.stderr.write(f"{name}: {problem['msg']}\n" if problem["loc"] else f"{problem['msg']}\n")
        sys.exit(2)
