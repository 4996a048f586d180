"""Texts and numbers: `/tokenize`, `/detokenize`, `/v1/embeddings`."""

import asyncio
import base64
from typing import Any

import torch
from fastapi import APIRouter, Request

from herd.engine import check_prompt
from herd.server.asking import conversation_ids
from herd.server.asks import TooLong
from herd.server.completions import text_ids
from herd.server.errors import ApiError
from herd.server.schemas import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from herd.server.state import Server, server
from herd.server.streaming import unless_gone

router = APIRouter()
MAX_EMBEDDED = 8192  # tokens of a text, and of all texts of a request 8 times that


@router.post("/tokenize")
def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a text, or of a conversation up to the opening of its answer."""
    its = server(request)
    its.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, and one of them", param="prompt")
    if body.prompt is not None:
        ids = text_ids(its, body.prompt)
    else:
        ids = conversation_ids(its, body.messages or [], body.tools or [])
    return {"tokens": ids, "count": len(ids), "max_model_len": its.model.config.max_position_embeddings}


@router.post("/detokenize")
def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of token ids."""
    its = server(request)
    its.check_model(body.model)
    return {"prompt": its.model.tokenizer.decode(body.tokens, keep_special=body.keep_special)}


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    """The mean of the last hidden states of each text's tokens, of length 1. No model was trained for that here."""
    its = server(request)
    its.check_model(body.model)
    if body.dimensions not in (None, its.model.config.hidden_size):
        raise ApiError(400, f"embeddings have {its.model.config.hidden_size} dimensions", param="dimensions")
    given: Any = body.input
    many = isinstance(given, list) and (not given or not isinstance(given[0], int))
    rows = await asyncio.to_thread(
        lambda: [text_ids(its, one) if isinstance(one, str) else list(one) for one in (given if many else [given])]
    )
    if not rows:
        raise ApiError(400, "input is empty; give at least one text", param="input")
    for ids in rows:
        check_prompt(its.model.config, ids)
    if max(map(len, rows)) > MAX_EMBEDDED or sum(map(len, rows)) > 8 * MAX_EMBEDDED:
        raise TooLong(
            f"a text to embed may have {MAX_EMBEDDED:,} tokens and all of a request {8 * MAX_EMBEDDED:,}; "
            f"the longest has {max(map(len, rows)):,} and all have {sum(map(len, rows)):,}"
        )
    data = []
    for index, ids in enumerate(rows):
        values = await unless_gone(request, its.service.call(lambda ids=ids: _embedding(its, ids)))  # type: ignore[misc]
        coded: Any = values.tolist()
        if body.encoding_format == "base64":
            coded = base64.b64encode(values.numpy().tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": coded})
    used = sum(map(len, rows))
    return {
        "object": "list",
        "data": data,
        "model": its.settings.name,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }


@torch.inference_mode()
def _embedding(server: Server, ids: list[int]) -> torch.Tensor:
    """Float32 [D]."""
    mean_D = server.model.transformer.states(torch.tensor([ids]))[0].float().mean(0)
    return torch.nn.functional.normalize(mean_D, dim=0)
