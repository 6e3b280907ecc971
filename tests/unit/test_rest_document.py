"""The published OpenAPI document: what it promises holds for requests made from it."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.rest_fakes import Fakes

schema = schemathesis.openapi.from_asgi("/openapi.json", Fakes().app())
schema = schema.exclude(path_regex="[}]:")  # our own API: tests/integration/test_own_rest.py
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_what_the_document_says(case: Case) -> None:
    if isinstance(case.body, dict) and "model" in case.body:  # or nearly all would only be told 404
        case.body["model"] = "vectors" if "input" in case.body else "text"
    answer = case.call()
    # An event is not of the stream's type, which is text: only OpenAPI 3.2 has a word for events. What they
    # are is seen in test_rest_answers.py.
    streamed = answer.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(answer, checks=CHECKS, excluded_checks=[response_schema_conformance] * streamed)
