"""The server against its own OpenAPI document: whatever schemathesis sends, the answer is one that the document names,
and the server is as good as new behind it."""

from __future__ import annotations

import pytest
from test_serve import idle, make_async, serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import checks  # noqa: E402

CHECKS = [
    checks.load_all_checks() or checks.CHECKS.get_one(name)
    for name in (
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
        "negative_data_rejection", "missing_required_header", "ignored_auth",
    )
]  # fmt: skip
HEADERS = {"Authorization": "Bearer right"}


@pytest.fixture(scope="module")
def server():
    engine = make_async()
    with serving(engine, api_keys=("right",), max_body=50_000, max_requests=40, max_tokens=8) as (address, app):
        yield address, app
        assert idle(app)
    usage = engine.cache.usage()
    assert usage.pages_free == usage.pages_total


def fuzz(server, examples: int) -> None:
    address, app = server
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path="/live")  # which has no end
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:

        @settings(
            max_examples=examples if operation.method == "post" else 2, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(
            st.one_of(
                operation.as_strategy(),
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
            ),
            st.booleans(),
        )
        def one(case, named):
            if named and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"  # else most would end at the name
            case.call_and_validate(headers=HEADERS, checks=CHECKS, timeout=60)

        one()
    assert idle(app)


def test_what_the_document_allows_and_what_it_does_not(server) -> None:
    fuzz(server, 25)


@pytest.mark.slow
def test_much_more_of_it(server) -> None:
    fuzz(server, 1000)
