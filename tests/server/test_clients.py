"""Clients that nobody wrote for Herd."""

import base64
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel

from tests.server.served import Served, user
from tests.server.test_tools import COUNTRY, WEATHER, fits

TURN: list[Any] = [user("What is a herd?")]


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def test_openai_chats(served: Served, client: openai.OpenAI) -> None:
    alone = served.alone(TURN[0]["content"], 12)
    made = client.chat.completions.create(model="tiny", messages=TURN, max_tokens=12, temperature=0)
    assert made.choices[0].message.content == alone
    assert made.usage is not None and made.usage.prompt_tokens_details is not None
    stream = client.chat.completions.create(
        model="tiny",
        messages=TURN,
        max_completion_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == alone
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == made.usage.total_tokens
    # What comes back may be sent again as it is.
    turns = [*TURN, made.choices[0].message.model_dump(), user("And then?")]
    assert client.chat.completions.create(model="tiny", messages=turns, max_tokens=3).choices
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_openai_tools_and_schemas(served: Served, client: openai.OpenAI) -> None:
    required: Any = {"model": "tiny", "messages": TURN, "tools": [WEATHER], "tool_choice": "required", "seed": 3}
    message = client.chat.completions.create(**required, max_tokens=200).choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function" and fits(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    with client.chat.completions.stream(**required) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    assert [one.function.arguments for one in choice.message.tool_calls] == [call.function.arguments]
    again: Any = {**required, "messages": [*TURN, message, result], "tool_choice": "auto"}
    assert client.chat.completions.create(**again, max_tokens=2).choices

    class Gate(BaseModel):
        code: Literal["4711", "4712"]
        open: bool

    blanks = served.model.tokenizer.encode(" \n\t")  # which this model would say too many of
    settings: Any = {
        "model": "tiny",
        "messages": TURN,
        "max_tokens": 60,
        "logit_bias": {str(id): -100 for id in blanks},
    }
    with client.chat.completions.stream(**settings, response_format=Gate) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Gate)


def test_openai_completions(served: Served, client: openai.OpenAI) -> None:
    ids = served.model.tokenizer.encode("The herd went")
    made = served.model.generate(ids, max_tokens=16)
    for prompt in ("The herd went", ids):
        said = client.completions.create(model="tiny", prompt=prompt, temperature=0, logprobs=2)
        assert said.choices[0].text == made.text and said.choices[0].logprobs is not None
    many = client.completions.create(model="tiny", prompt=["The herd went", "A"], temperature=0, echo=True, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices[:2]] == ["The herd went" + made.text] * 2
    chunks = list(client.completions.create(model="tiny", prompt=ids, temperature=0, stream=True, max_tokens=9))
    assert "".join(chunk.choices[0].text for chunk in chunks) == served.model.generate(ids, max_tokens=9).text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_openai_embeddings(served: Served, client: openai.OpenAI) -> None:
    texts = ["A herd of goats.", "☃"]
    made = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for text, row in zip(texts, made.data, strict=True):
        ids = torch.tensor([served.model.tokenizer.encode(text)])
        with torch.inference_mode():
            mean = served.model.transformer.states(ids)[0].float().mean(0)
        assert row.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    coded = served.ask("/v1/embeddings", input=texts[0], encoding_format="base64")["data"][0]["embedding"]
    values = struct.unpack(f"<{len(made.data[0].embedding)}f", base64.b64decode(coded))
    assert values == pytest.approx(made.data[0].embedding, abs=1e-6)


def test_openai_responses(served: Served, client: openai.OpenAI) -> None:
    alone = served.alone(TURN[0]["content"], 12)
    made = client.responses.create(model="tiny", input=TURN[0]["content"], max_output_tokens=12, temperature=0)
    assert made.output_text == alone and made.status == ("incomplete" if made.incomplete_details else "completed")
    stream = client.responses.create(model="tiny", input=TURN, max_output_tokens=12, temperature=0, stream=True)
    events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == alone
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete") and last.response.output_text == alone
    turns: Any = [*TURN, *(item.model_dump(exclude_none=True) for item in made.output), user("And then?")]
    assert client.responses.create(model="tiny", input=turns, max_output_tokens=2, instructions="Be brief.").output
    form: Any = {"format": {"type": "json_schema", "name": "country", "schema": COUNTRY}}
    said = client.responses.create(model="tiny", input="x", text=form, max_output_tokens=200)
    assert said.status == "incomplete" or json.loads(said.output_text).keys() == {"name", "people"}


def test_openai_responses_with_tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    settings: Any = {"model": "tiny", "tools": [tool], "tool_choice": "required", "max_output_tokens": 200}
    made = client.responses.create(input="Weather?", **settings)
    [call] = made.output
    assert call.type == "function_call" and fits(call.arguments)
    turns: Any = [user("Weather?"), call.model_dump(exclude_none=True)]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert client.responses.create(model="tiny", input=turns, tools=[tool], max_output_tokens=2).output
    events = list(client.responses.create(input="Weather?", **settings, stream=True))
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert fits(done.arguments) and "".join(deltas) == done.arguments and len(deltas) > 3
    with client.responses.stream(input="Weather?", **settings) as stream:
        [call] = stream.get_final_response().output
    assert call.type == "function_call" and call.status == "completed" and fits(call.arguments)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id=made.id)


def test_openai_raises_its_own_errors(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=TURN, max_tokens=1 << 25)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=TURN)
    with pytest.raises(openai.BadRequestError, match="Unknown field: best_of_all"):
        client.chat.completions.create(model="tiny", messages=TURN, extra_body={"best_of_all": 2})


def test_litellm(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    settings: Any = {"model": "openai/tiny", "api_base": f"{served.url}/v1", "api_key": "any", "messages": TURN}
    alone = served.alone(TURN[0]["content"], 12)
    made: Any = litellm.completion(**settings, max_tokens=12, temperature=0)
    assert made.choices[0].message.content == alone
    stream: Any = litellm.completion(**settings, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == alone
    called: Any = litellm.completion(**settings, tools=[WEATHER], tool_choice="required", max_tokens=200)
    assert fits(called.choices[0].message.tool_calls[0].function.arguments)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**settings, max_tokens=1 << 25)


def test_llm(served: Served, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny\n  api_base: {served.url}/v1\n  can_stream: true\n"
    )
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
    prompt = ["-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "12", TURN[0]["content"]]
    for more in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "prompt", *prompt, *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.removesuffix("\n") == served.alone(TURN[0]["content"], 12)
