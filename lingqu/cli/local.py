"""What `lingqu up` does: supervise the parts, publish the bundled models, say what to try."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from rich.markup import escape

import lingqu
from deploy.local.layout import GATEWAY, PUBLIC, REGISTRY, Layout
from deploy.local.parts import Options, PartMissing, parts
from deploy.local.supervisor import CannotStart, Event, Supervisor
from deploy.local.triton import TritonUnusable
from lingqu.cli.connection import Suite, err, out
from lingqu.publishing import Artifact, Publisher, PublishFailed
from pipeline.bundled import Bundled, bundled
from services.core import tls
from services.core.lifecycle import CHANNEL_OPTIONS
from services.core.signing import Signer

PUBLISH_TIMEOUT_S = 300.0


async def up(
    suite: Suite,
    offset: int,
    otlp: str,
    log_level: str,
    with_models: bool,
    tritons: int = 1,
    secured: bool = False,
    metrics: bool = True,
) -> int:
    """Returns the exit code: 0 after a stop that was asked for, 1 if the suite could not start."""
    layout = Layout(suite.state.resolve(), offset, secured)
    begun = time.monotonic()
    _stop_on_signals()
    out.print(f"[bold]lingqu {lingqu.__version__}[/bold] · state in {suite.state}")
    try:
        models = await asyncio.to_thread(bundled, out.print) if with_models else []
        all_parts = parts(layout, Options(otlp, log_level, tritons, metrics))
        async with Supervisor(layout, all_parts, lambda event: _tell(layout, event)).running():
            await _publish(layout, models)
            _hint(suite, layout, time.monotonic() - begun, with_models)
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        out.print("stopped; nothing is left running")
        return 0
    except (CannotStart, PartMissing, TritonUnusable, PublishFailed) as error:
        err.print(f"[red]cannot start:[/red] {escape(str(error))}")
        return 1
    raise AssertionError("unreachable")


def _stop_on_signals() -> None:
    """The first signal unwinds the suite in order; a second one leaves it to the guard."""
    task = asyncio.current_task()
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked or task is None:
            os._exit(130)
        asked = True
        out.print("\nstopping … (once more: at once)")
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


async def _publish(layout: Layout, models: list[Bundled]) -> None:
    async with (
        tls.channel(layout.address(REGISTRY), CHANNEL_OPTIONS, layout.identity("cli")) as registry,
        tls.channel(layout.address(GATEWAY), CHANNEL_OPTIONS, layout.identity("cli")) as gateway,
    ):
        signer = Signer.at(layout.publisher_key)
        publisher = Publisher(registry, gateway, layout.dev_key.read_text().strip())
        for model in models:
            begun = time.monotonic()
            artifact = Artifact.at(model.package.folder).signed(signer, model.name)
            # Published once; after that the user decides which version has the traffic.
            try:
                version = await publisher.ready(model.name, PUBLISH_TIMEOUT_S)
            except PublishFailed as error:  # it was made for an engine that has been replaced, for example
                err.print(f"  [yellow]{escape(str(error))}[/yellow]; publishing the bundled version instead")
                version = 0
            version = version or await publisher.publish(
                model.name, artifact, traffic=True, timeout_s=PUBLISH_TIMEOUT_S, tell=lambda text: None
            )
            _line(f"{model.name} v{version}", "ready", time.monotonic() - begun, artifact.task)


def _tell(layout: Layout, event: Event) -> None:
    if event.what == "died":
        log = layout.logs / f"{event.part}.log"
        _line(
            event.part,
            "[red]died[/red]",
            event.seconds,
            f"{event.detail} after that long; starting it again, see {log}",
        )
    else:
        _line(event.part, event.what, event.seconds, "")


def _line(name: str, what: str, seconds: float, detail: str) -> None:
    out.print(f"  {name:<26} {what:<8} {seconds:5.1f} s  [dim]{detail}[/dim]".rstrip())


def _hint(suite: Suite, layout: Layout, seconds: float, with_models: bool) -> None:
    command = "lingqu" if str(suite.state) == ".lingqu" else f"lingqu --state {suite.state}"
    out.print(f"\nserving on [bold]{layout.address(PUBLIC)}[/bold] after {seconds:.1f} s\n")
    if with_models:
        out.print(f'  {command} generate "Why do canals have locks?"')
        out.print(f'  {command} embed "a canal" "a river" "a keyboard"')
    out.print(f"  {command} status")
    out.print("\nCtrl-C stops everything.")
