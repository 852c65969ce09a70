"""Whatever is sent to the routes that /openapi.json describes, none answers with a fault of ours."""

from collections.abc import Iterator
from dataclasses import replace

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error

from tests.server.conftest import Live, listening, settings_in

EXAMPLES = 6  # of each route; those of ComfyUI are there several times, of which one is tried
TWICE = ("/api/", "/comfy/")
ENDLESS = ("/octavo/events",)  # streams


@pytest.fixture(scope="module")
def hardy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose requests end soon, whatever they ask for."""
    settings = settings_in(tmp_path_factory.mktemp("schema"), max_pixels=64 * 64, max_body=2**20, workers=4)
    with listening(replace(settings, job_timeout=0.3)) as live:
        yield live


def test_no_request_makes_a_fault_of_ours(hardy: Live) -> None:
    schema = schemathesis.openapi.from_url(f"{hardy.url}/openapi.json")
    tried = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path.startswith(TWICE) or operation.path in ENDLESS:
            continue
        good, bad = (operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)

        @hypothesis.given(case=good | bad)
        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        def send(case: schemathesis.Case) -> None:
            response = case.call(timeout=20)
            if response.status_code != 503 or "Retry-After" not in response.headers:
                case.validate_response(response, checks=(not_a_server_error,))

        send()
        tried += 1
    assert tried > 60
