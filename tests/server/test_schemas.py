"""schemathesis: whether a request keeps to the schema or not, no route fails, and the server lives on."""

from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.server.served import Served


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_the_server_fail(served: Served, mode: GenerationMode) -> None:
    api, tried = schemathesis.openapi.from_url(f"{served.url}/openapi.json"), 0
    for found in api.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=6,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            nonlocal tried
            tried += 1
            if isinstance(case.body, dict):  # answers of any length are tried elsewhere
                case.body |= {name: 2 for name in ("max_tokens", "max_output_tokens") if case.body.get(name)}
            case.call_and_validate(checks=[not_a_server_error], timeout=60)

        with suppress(Unsatisfiable):  # nothing can be wrong in a request without fields
            ask()
    assert tried >= 40
    served.alive()


def test_all_routes_are_in_the_schema(served: Served) -> None:
    paths = served.http.get("/openapi.json").json()["paths"]
    wanted = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/contexts", "/tokenize"}
    assert wanted <= paths.keys()
