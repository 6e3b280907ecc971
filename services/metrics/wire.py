"""OTLP's metrics as this service reads them: the same messages on the wire, but the attributes of a data
point stay bytes until they are asked for.

Points of a series repeat its attributes. As bytes they are found again by one look-up; as messages, reading
them takes more than everything else that becomes of a point.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from opentelemetry.proto.metrics.v1 import metrics_pb2

_PACKAGE = "lingqu.otlp"


def _messages() -> Any:
    """MetricsData of OpenTelemetry's own description, with those fields changed."""
    file = descriptor_pb2.FileDescriptorProto()
    metrics_pb2.DESCRIPTOR.CopyToProto(file)
    theirs = f".{file.package}."
    file.name, file.package = "lingqu/otlp.proto", _PACKAGE
    for message in file.message_type:
        for field in message.field:
            if field.name == "attributes" and message.name.endswith("DataPoint"):
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
                field.ClearField("type_name")
            elif field.type_name.startswith(theirs):
                field.type_name = f".{_PACKAGE}.{field.type_name.removeprefix(theirs)}"
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.MetricsData"))


MetricsData: Any = _messages()
"""What an export is on the wire: ExportMetricsServiceRequest has the same one field."""
