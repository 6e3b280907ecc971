"""Puts the inference service together: registry watch, agent, registration, server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from pydantic import Field

from lingqu.inference.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from services.core import certificates, http2
from services.core.access import watched_access
from services.core.discovery import Model, Replica, Version
from services.core.interceptors import server_stack
from services.core.lifecycle import MAX_MESSAGE_BYTES, serving
from services.core.limiters import addresses, watched_owners
from services.core.registration import Registration
from services.core.registry import Registry, Watched
from services.core.settings import Address, Addresses, Labels, Settings, Trusted
from services.core.tasks import background
from services.core.telemetry import metering, tracing
from services.inference.admission import Admission
from services.inference.agent import Agent
from services.inference.answers import Answers
from services.inference.comparisons import Comparisons
from services.inference.engines import Engines
from services.inference.figures import KV_TOKENS, SLOTS, UP, Figures, gauge_labels
from services.inference.generation import Generation
from services.inference.placement import desired
from services.inference.quarantine import Quarantine
from services.inference.repository import Repository
from services.inference.requirements import Machine
from services.inference.rest.app import rest_app
from services.inference.rest.permits import by_records
from services.inference.rest.server import serving_http
from services.inference.rest.serving import Models, admitted
from services.inference.routing import Routing
from services.inference.served import Limits, TensorModel
from services.inference.service import Inference
from services.inference.store import Store
from services.inference.tensorrt.builder import SubprocessBuilder
from services.inference.tensorrt.plan import Plans
from services.inference.text import TextModel
from services.inference.triton import Triton
from services.inference.usage import UsageReports

SERVICE = "lingqu.inference.v1.InferenceService"


class InferenceSettings(Settings):
    inference_listen: Address = "127.0.0.1:8083"
    inference_address: Address | None = None
    """Where others reach this process; default: inference_listen."""
    inference_http_listen: Address = "127.0.0.1:8093"
    """Where OpenAI's REST API is served."""
    inference_http_address: Address | None = None
    """Where others reach it; default: inference_http_listen."""
    triton: Address = "127.0.0.1:8001"
    registry: Addresses = "127.0.0.1:8082"
    instance_ttl_s: int = 10
    labels: Labels = Field(default_factory=dict)
    """Of this replica, "zone=a,gpu=l4": placements choose by them."""
    artifacts: Path = Path(".lingqu/artifacts")
    """Folder of verified copies of artifacts."""
    trusted_keys: Trusted = None
    """Public keys of those whose signatures count; None: signatures are not demanded."""
    model_repository: Path = Path(".lingqu/triton/models")
    """Triton's --model-repository."""
    kv_cache_gib: int = 1
    """Memory of a text engine's KV cache, GiB."""
    vector_cache_mib: int = 32
    """Memory for the vectors or labels of texts that came before, MiB, of each version of a model."""
    max_sequences: int = 256
    """Sequences of one text model in progress at once; more are refused with RESOURCE_EXHAUSTED."""
    slots: int = Field(64, ge=1)
    """Requests of one version that run at once, each of n candidates counting n times; others wait."""
    queue: int = Field(512, ge=0)
    """Requests of one version that wait; more are refused with RESOURCE_EXHAUSTED and RetryInfo."""
    answers_mib: int = Field(64, ge=0)
    """Memory for answers that are kept to be given again, MiB; 0: none are kept."""
    engine_timeout_s: float = Field(30.0, gt=0)
    """How long an engine that has work may say nothing before it is taken for hung and ended."""
    forget_quarantine: bool = False
    """Try versions again that were quarantined."""


@asynccontextmanager
async def running(cfg: InferenceSettings) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        tracer = stack.enter_context(tracing("lingqu-inference", cfg.otlp_endpoint))
        address = cfg.inference_address or cfg.inference_listen
        registry, triton = Registry(cfg.registry, cfg.identity), Triton(cfg.triton, cfg.identity)
        stack.push_async_callback(registry.close)
        limiters = watched_owners(registry, asyncio.Event())
        usage = UsageReports(lambda: addresses(limiters.items.values()), cfg.identity)
        meter = stack.enter_context(metering("lingqu-inference", *cfg.collector, address))
        certificates.tell_days_left(meter, certificates.of(cfg.identity))
        comparisons = Comparisons(cfg.metrics, cfg.identity)
        figures = Figures(meter, usage.charge, comparisons.ended)
        figures.gauge(UP, lambda: [({}, 1.0)])
        admission = Admission(min(cfg.slots, cfg.max_sequences), cfg.queue, figures)
        stack.push_async_callback(triton.close)

        machine = Machine.here()
        replica = Replica(
            f"inference-{address.replace(':', '-')}",
            "inference",
            {
                "grpc": address,
                "http": cfg.inference_http_address or cfg.inference_http_listen,
                "oip": cfg.triton,
            },
            labels={**machine.labels, **cfg.labels},
        )
        registration = Registration(registry, replica, cfg.instance_ttl_s)
        changed = asyncio.Event()
        models = registry.watched_models(changed)
        replicas = registry.watched_replicas("inference", changed)
        access = watched_access(registry, asyncio.Event())
        parameters = {
            "kv_cache_gib": str(cfg.kv_cache_gib),
            "max_sequences": str(cfg.max_sequences),
            "otlp_endpoint": cfg.otlp_endpoint,
        }
        store = Store(cfg.artifacts, cfg.trusted_keys)
        quarantine = Quarantine(cfg.model_repository.absolute().parent / "quarantine.json")
        if cfg.forget_quarantine:
            quarantine.forget_all()
        repository = Repository(cfg.model_repository, parameters)
        agent = Agent(
            triton,
            store,
            repository,
            Limits(
                cfg.max_sequences, cfg.kv_cache_gib << 30, cfg.engine_timeout_s, cfg.vector_cache_mib << 20
            ),
            machine,
            registration.update,
            admission.busy,
            quarantine,
            plans=Plans(cfg.artifacts.absolute().parent / "plans", SubprocessBuilder()),
        )
        stack.push_async_callback(agent.close)
        _tell(figures, agent, min(cfg.slots, cfg.max_sequences))
        follow = _follow(agent, models, replicas, registration, changed)
        stack.callback(store.close)  # or the process would wait for the thread that fetches
        engines = Engines(triton, repository.secret, lambda: agent.served, figures)
        await stack.enter_async_context(
            background(models.run(), replicas.run(), limiters.run(), access.run(), follow, engines.run())
        )

        await stack.enter_async_context(usage.running())
        if cfg.metrics:
            await stack.enter_async_context(comparisons.running())
        server = http2.Server(server_stack(tracer, cfg.max_in_flight), max_message=MAX_MESSAGE_BYTES)
        routing = Routing(lambda: models.items if models.synced.is_set() else None, agent.served)
        generation = Generation(admission, Answers(cfg.answers_mib << 20), figures, routing.labels)
        add_InferenceServiceServicer_to_server(Inference(routing, generation, admission), server)
        await stack.enter_async_context(generation.serving(lambda: agent.served))
        await stack.enter_async_context(
            serving(server, cfg.inference_listen, [SERVICE], cfg.grace_s, cfg.identity)
        )
        rest = rest_app(
            Models(routing, generation.generate, admitted(admission)),
            tracer,
            cfg.max_in_flight,
            permits=by_records(lambda: access.items if access.synced.is_set() else None),
        )
        await stack.enter_async_context(
            serving_http(rest, cfg.inference_http_listen, cfg.grace_s, cfg.identity)
        )
        # Known to others last, forgotten by them first.
        stack.push_async_callback(registration.withdraw)
        await stack.enter_async_context(background(registration.run()))
        yield


def _tell(figures: Figures, agent: Agent, slots: int) -> None:
    """What there is of versions that may be asked, asked yet or not."""

    def slotted() -> Iterator[tuple[Mapping[str, str], float]]:
        for key, model in list(agent.served.items()):
            if not isinstance(model, TensorModel):  # Triton's own queue is in its place
                yield gauge_labels(key), slots

    def cached() -> Iterator[tuple[Mapping[str, str], float]]:
        for key, model in list(agent.served.items()):
            if isinstance(model, TextModel) and model.kv_tokens:
                yield gauge_labels(key), model.kv_tokens

    figures.gauge(SLOTS, slotted)
    figures.gauge(KV_TOKENS, cached)


async def _follow(
    agent: Agent,
    models: Watched[Model],
    replicas: Watched[Replica],
    registration: Registration,
    changed: asyncio.Event,
) -> None:
    """Act only on what the registry has said: an unknown state is not an empty one."""
    await asyncio.gather(models.synced.wait(), replicas.synced.wait())

    def wanted() -> list[Version]:
        return desired(models.items.values(), registration.replica, replicas.items.values())

    await agent.run(wanted, changed)
