"""The application: all routes behind the guard."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from herd import __version__
from herd.server import chat, chats, completions, contexts_api, errors, pages, responses, tokens
from herd.server.contexts import Contexts
from herd.server.library import Library
from herd.server.security import Guard
from herd.server.service import Service
from herd.server.state import Server, Settings, server
from herd.server.structured import Grammars

_router = APIRouter()


def create_app(service: Service, library: Library, settings: Settings) -> FastAPI:
    """The application for one model and one data folder; its owner closes both."""
    app = FastAPI(title="Herd", version=__version__, docs_url=None, redoc_url=None, lifespan=pages.lifespan)
    app.state.server = Server(settings, service, library, Contexts(library, service), Grammars(service.model.tokenizer))
    errors.install(app)
    for its in (
        _router,
        chat.router,
        completions.router,
        responses.router,
        tokens.router,
        contexts_api.router,
        chats.router,
        pages.router,
    ):
        app.include_router(its)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    return app


@_router.get("/v1/models")
def models(request: Request) -> dict[str, Any]:
    """The model that this server runs."""
    return {"object": "list", "data": [_model(server(request))]}


@_router.get("/v1/models/{name:path}")
def model(name: str, request: Request) -> dict[str, Any]:
    """What is said of the model."""
    server(request).check_model(name)
    return _model(server(request))


@_router.get("/health")
def health(request: Request) -> JSONResponse:
    """200 while requests are taken."""
    service = server(request).service
    said = {"status": "ok" if service.open else "stopping"} | _replicas(service)
    return JSONResponse(said, 200 if service.open else 503)


@_router.get("/metrics")
def metrics(request: Request) -> Response:
    """Counts in Prometheus' format."""
    its = server(request)
    service, counts = its.service, its.service.metrics
    all_of = [service] if service.elsewhere is None else [service, service.elsewhere]
    counts.waiting.set(sum(one.waiting for one in all_of))
    counts.running.set(sum(one.running for one in all_of))
    counts.kv_bytes.set(sum(one.memory_used for one in all_of))
    counts.kv_limit.set(sum(one.memory for one in all_of))
    for state, count in _replicas(service).get("replicas", {}).items():
        counts.replicas.labels(state).set(count)
    counts.context_tokens.set(sum(info.tokens for info in its.contexts.all()))
    return Response(counts.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _replicas(service: Service) -> dict[str, dict[str, int]]:
    """How many replicas answer, and how many there should be, if there are any."""
    found = None if service.elsewhere is None else service.elsewhere.replicas
    return {} if found is None else {"replicas": {"running": found.alive, "wanted": found.count}}


def _model(its: Server) -> dict[str, Any]:
    cfg = its.model.config
    return {
        "id": its.settings.name,
        "object": "model",
        "created": 0,
        "owned_by": "herd",
        "max_model_len": cfg.max_position_embeddings,
        "fingerprint": its.model.fingerprint,
        "images": its.model.vision is not None,
    }
