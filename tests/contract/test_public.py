"""The public contract of this version: names, fields and ports that tools outside are written against."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pool import Default
from typer.testing import CliRunner

import lingqu.gateway.v1.gateway_pb2
import lingqu.inference.v1.inference_pb2
import lingqu.metrics.v1.metrics_pb2
import lingqu.registry.v1.instances_pb2
import lingqu.registry.v1.models_pb2  # noqa: F401 - importing registers the descriptors
from lingqu.cli.main import app
from services.gateway.app import GatewaySettings
from services.inference.app import InferenceSettings
from services.metrics.app import MetricsSettings
from services.registry.app import RegistrySettings

METHODS = {
    "lingqu.inference.v1.InferenceService": {"Generate", "StreamGenerate", "Embed"},
    "lingqu.registry.v1.RegistryService": {
        "RegisterInstance",
        "KeepAlive",
        "DeregisterInstance",
        "ListInstances",
        "WatchInstances",
    },
    "lingqu.registry.v1.ModelService": {
        "CreateModelVersion",
        "GetModelVersion",
        "ListModelVersions",
        "SetTraffic",
        "WatchModels",
    },
    "lingqu.metrics.v1.MetricsService": {
        "Query",
        "ListSeries",
        "Tail",
        "GetCapacity",
        "CreateAlertRule",
        "UpdateAlertRule",
        "DeleteAlertRule",
        "ListAlertRules",
        "ListAlerts",
        "CreateSilence",
        "DeleteSilence",
        "ListSilences",
        "TestWebhook",
    },
    "lingqu.gateway.v1.GatewayService": {"CreateKey", "DescribeRoutes", "ExplainRoute"},
}
FIELDS = {
    "lingqu.inference.v1.GenerateRequest": {
        "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    },
    "lingqu.inference.v1.Message": {"role", "content"},
    "lingqu.inference.v1.GenerateResponse": {"text", "finish_reason", "usage", "model_version"},
    "lingqu.inference.v1.GenerateChunk": {"text", "finish_reason", "usage", "model_version"},
    "lingqu.inference.v1.Usage": {"prompt_tokens", "completion_tokens"},
    "lingqu.inference.v1.EmbedRequest": {"model", "inputs"},
    "lingqu.inference.v1.EmbedResponse": {"embeddings", "usage", "model_version"},
    "lingqu.inference.v1.Embedding": {"values"},
}  # fmt: skip


@pytest.mark.parametrize("service", METHODS)
def test_a_service_has_its_methods(service: str) -> None:
    found = {method.name for method in Default().FindServiceByName(service).methods}  # type: ignore[no-untyped-call]
    assert found >= METHODS[service]


@pytest.mark.parametrize("message", FIELDS)
def test_a_message_has_its_fields(message: str) -> None:
    found = {field.name for field in Default().FindMessageTypeByName(message).fields}  # type: ignore[no-untyped-call]
    assert found >= FIELDS[message]


def test_the_ports_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "REGISTRY_LISTEN",
        "GATEWAY_LISTEN",
        "PUBLIC_LISTEN",
        "INFERENCE_LISTEN",
        "INFERENCE_HTTP_LISTEN",
        "METRICS_LISTEN",
        "METRICS_HTTP_LISTEN",
        "TRITON",
        "ETCD",
    ):
        monkeypatch.delenv(f"LINGQU_{name}", raising=False)
    assert GatewaySettings().public_listen == "127.0.0.1:8080"
    assert GatewaySettings().gateway_listen == "127.0.0.1:8081"
    assert RegistrySettings().registry_listen == "127.0.0.1:8082"
    assert InferenceSettings().inference_listen == "127.0.0.1:8083"
    assert InferenceSettings().inference_http_listen == "127.0.0.1:8093"
    assert MetricsSettings().metrics_listen == "127.0.0.1:4317"
    assert MetricsSettings().metrics_http_listen == "127.0.0.1:4318"
    assert InferenceSettings().triton == "127.0.0.1:8001"
    assert RegistrySettings().etcd == "127.0.0.1:2379"


@pytest.mark.parametrize(
    "command",
    [
        "up", "status", "generate", "chat", "embed", "classify", "answer", "tokenize", "instances",
        "models list", "models show", "models publish", "keys create", "keys revoke", "keys revoked",
        "keys list", "keys rotate", "keys signing",
        "clients list", "clients show", "clients set", "clients delete",
        "metrics query", "metrics list", "metrics tail", "capacity",
        "alerts", "alerts list", "alerts rules create", "alerts silence",
        "registry backup", "registry restore",
    ],
)  # fmt: skip
def test_a_command_explains_itself(command: str) -> None:
    said = CliRunner().invoke(app, [*command.split(), "--help"])
    assert said.exit_code == 0
    assert "Usage" in said.output
