"""How commands find a suite: its state folder says the ports, its dev.key opens them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
import typer
from rich.console import Console

from lingqu.client import Client, LingquError, connected
from lingqu.publishing import PublishFailed

T = TypeVar("T")
GATEWAY_PORT = 8081
REGISTRY_PORT = 8082
METRICS_PORT = 4317
# Tables are not squeezed into 80 columns when nobody looks at a terminal.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Suite:
    """Where a suite is. `address` is that of its public port if it is not the local one, `ca` a PEM file of
    the CA that its certificate is from."""

    state: Path
    address: str | None
    key: str | None
    ca: Path | None = None

    @property
    def offset(self) -> int:
        return int(self._written("offset") or 0)

    @property
    def trusted(self) -> Path | None:
        """Whom the public port's certificate is from; None: it has none."""
        if self.ca is not None or self.address is not None:
            return self.ca
        return self.state / "tls" / "ca.pem" if self._written("tls") else None

    def _written(self, name: str) -> Any:
        try:
            return json.loads((self.state / "suite.json").read_text())[name]
        except (OSError, ValueError, KeyError):
            return None

    def local(self, port: int) -> str:
        return f"127.0.0.1:{port + self.offset}"

    @property
    def public(self) -> str:
        return self.address or self.local(8080)

    @property
    def secret(self) -> str:
        """The key given, the one in LINGQU_KEY, or the suite's own dev.key."""
        if given := self.key or os.environ.get("LINGQU_KEY"):
            return given
        try:
            return (self.state / "dev.key").read_text().strip()
        except OSError:
            fail(
                f"no key: {self.state / 'dev.key'} cannot be read. Is the suite running (`lingqu status`)? "
                "Otherwise pass --key or set LINGQU_KEY."
            )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For calls of the parts behind the public port: they know the caller by it. None without a key."""
        return (("authorization", f"Bearer {key}"),) if (key := self.secret) else ()

    def client(self) -> Client:
        """Raises typer.Exit at once if the local suite does not run, instead of trying for minutes."""
        if self.address is None:
            self.running()
        try:
            return Client(self.public, self.secret, ca=self.trusted)
        except OSError as error:
            fail(f"the CA cannot be read: {error}")

    def running(self) -> dict[str, Any]:
        """What suite.json says of the running suite. Raises typer.Exit if none runs in this folder."""
        try:
            body: dict[str, Any] = json.loads((self.state / "suite.json").read_text())
            os.kill(int(body["pid"]), 0)
        except (OSError, ValueError, KeyError):
            fail(
                f"no suite is running in {self.state.resolve()}: start one with `lingqu up`, or name another "
                "folder with `lingqu --state DIR …`"
            )
        return body

    def channel(self, port: int) -> grpc.aio.Channel:
        """To a part that only the machine of the suite reaches. Raises typer.Exit for a remote suite."""
        if self.address is not None:
            fail("--address reaches the public port only; run this command on the suite's own machine")
        folder = self.state / "tls"
        own = (folder / "cli.pem", folder / "cli-key.pem")
        return connected(self.local(port), *((folder / "ca.pem", own) if self._written("tls") else ()))


def fail(message: str) -> NoReturn:
    err.print(f"[red]error:[/red] {_escaped(message)}")
    raise typer.Exit(1)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work; errors become one line, Ctrl-C a quiet end."""
    try:
        return asyncio.run(work)
    except LingquError as error:
        hint = " (is the suite running? `lingqu up`)" if error.code == grpc.StatusCode.UNAVAILABLE else ""
        fail(f"{error}{hint}")
    except grpc.aio.AioRpcError as error:
        hint = " (is the suite running? `lingqu up`)" if error.code() == grpc.StatusCode.UNAVAILABLE else ""
        fail(f"{error.details() or error.code().name}{hint}")
    except PublishFailed as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        raise typer.Exit(130) from None


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
