"""schemathesis: whether a request keeps to the schema or not, no route fails, and the server lives on."""

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.server.served import Served

NO_END = "GET /api/events"  # a stream that goes on as long as the server; see the tests of the page
EXAMPLES = 4


def routes_of(served: Served) -> list[APIRoute]:
    """All that the server has, of whichever router."""
    routers = [its.original_router for its in served.app.routes if hasattr(its, "original_router")]
    return [route for router in routers for route in router.routes if isinstance(route, APIRoute)]


@pytest.fixture
def api(served: Served) -> Any:
    """All routes, those of the page as well, which /openapi.json does not list."""
    routes = routes_of(served)
    hidden = [route for route in routes if not route.include_in_schema]
    for route in hidden:
        route.include_in_schema = True
    try:
        schema = get_openapi(title="Herd", version="1", routes=routes)
    finally:
        for route in hidden:
            route.include_in_schema = False
    assert schema["paths"].keys() == {route.path_format for route in routes}
    found = schemathesis.openapi.from_dict(schema)
    found.config.update(base_url=served.url)
    return found


def made(served: Served, path: str) -> str:
    """The id of a new chat or context, whichever a path names."""
    if "/chats/" in path:
        return str(served.http.post("/api/chats", json={}).raise_for_status().json()["id"])
    return str(served.http.post("/v1/contexts", json={"name": "x"}).raise_for_status().json()["id"])


def statuses_of(served: Served, operation: Any, mode: GenerationMode) -> Counter[int]:
    """What examples of an operation are answered with. Every other one names a chat, context or model that is there."""
    seen = Counter[int]()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):  # answers of any length are tried elsewhere
            case.body |= {name: 2 for name in ("max_tokens", "max_output_tokens") if case.body.get(name)}
        if seen.total() % 2:
            if "{id}" in operation.path:
                case.path_parameters["id"] = made(served, operation.path)
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"
        seen[case.call_and_validate(checks=[not_a_server_error], timeout=60).status_code] += 1

    with suppress(Unsatisfiable):  # nothing can be wrong in a request without fields
        ask()
    return seen


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_the_server_fail(served: Served, api: Any, mode: GenerationMode) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    statuses = {its.label: statuses_of(served, its, mode) for its in operations if its.label != NO_END}
    tried = {label for label, seen in statuses.items() if seen}
    if mode is GenerationMode.POSITIVE:
        assert tried == statuses.keys()
        good = {label for label, seen in statuses.items() if any(status < 300 for status in seen)}
        assert len(good) > len(tried) / 2, tried - good
    else:
        assert tried >= {label for label in statuses if label.startswith("POST /v1/")}
    served.alive()


def test_all_routes_are_in_the_schema(served: Served) -> None:
    """But those of the page."""
    paths = served.http.get("/openapi.json").json()["paths"]
    routes = {route.path_format for route in routes_of(served)}
    assert len(routes) > 20
    assert {path for path in routes - paths.keys() if not path.startswith(("/api/", "/page/"))} == {"/"}
    wanted = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/contexts", "/tokenize"}
    assert wanted <= paths.keys()
