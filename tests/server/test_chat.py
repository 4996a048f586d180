"""/v1/chat/completions: the same tokens as from Python, whole and streamed, and OpenAI's errors."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.served import Served, user

TURN = [user("What is a herd?")]


def test_greedy_answers_are_those_of_python(served: Served) -> None:
    said = served.ask(messages=TURN, max_tokens=20, temperature=0, model="tiny")
    ids = served.model.tokenizer.chat(TURN)
    made = served.model.generate(ids, max_tokens=20)
    choice = said["choices"][0]
    assert choice["message"]["content"] == made.text
    assert choice["finish_reason"] == made.finish
    assert said["object"] == "chat.completion" and said["model"] == "tiny"
    used = said["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (len(ids), len(made.tokens))
    assert used["total_tokens"] == len(ids) + len(made.tokens)


def test_a_stream_says_what_the_whole_answer_does(served: Served) -> None:
    settings = {"messages": TURN, "max_tokens": 20, "temperature": 1.0, "seed": 4, "n": 3}
    whole = served.ask(**settings)
    chunks = served.events(**settings, stream_options={"include_usage": True})
    for index, choice in enumerate(whole["choices"]):
        its = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert its[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in its) == choice["message"]["content"]
        assert [c["finish_reason"] for c in its if c["finish_reason"]] == [choice["finish_reason"]]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == 3, "each choice draws for itself"
    assert (
        chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    )
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stop_strings_end_an_answer_before_them(served: Served) -> None:
    text = served.alone(TURN[0]["content"], 30)
    stop = text[10:13]
    said = served.ask(messages=TURN, max_tokens=30, temperature=0, stop=[stop, "never said"])
    choice = said["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert said["usage"]["completion_tokens"] < 30
    chunks = served.events(messages=TURN, max_tokens=30, temperature=0, stop=stop)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == choice["message"]["content"]


def test_logprobs_are_those_of_python(served: Served) -> None:
    from herd.engine import Sampler

    made = served.model.generate(served.model.tokenizer.chat(TURN), max_tokens=5, sampler=Sampler(logprobs=3))
    said = served.ask(messages=TURN, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3)
    entries = said["choices"][0]["logprobs"]["content"]
    assert [e["logprob"] for e in entries] == pytest.approx([t.logprob for t in made.tokens])
    for entry, token in zip(entries, made.tokens, strict=True):
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx([p for _, p in token.top])
        assert bytes(entry["bytes"]) == served.model.tokenizer.raw([token.id])
    chunks = served.events(messages=TURN, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3)
    streamed = [e for c in chunks if (its := c["choices"][0]["logprobs"]) for e in its["content"]]
    assert streamed == entries


def test_sampling_fields_do_what_those_of_the_engine_do(served: Served) -> None:
    from herd.engine import Sampler

    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 5}
    fields |= {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    made = served.model.generate(served.model.tokenizer.chat(TURN), max_tokens=12, sampler=Sampler(**fields))
    said = served.ask(messages=TURN, max_tokens=12, **fields)
    assert said["choices"][0]["message"]["content"] == made.text


def test_a_bias_makes_and_bans_tokens(served: Served) -> None:
    [made] = served.model.tokenizer.encode("x")
    said = served.ask(messages=TURN, max_tokens=4, temperature=0, logit_bias={str(made): 100})
    assert said["choices"][0]["message"]["content"] == "xxxx"
    first = served.model.generate(served.model.tokenizer.chat(TURN), max_tokens=1).ids[0]
    without = served.ask(messages=TURN, max_tokens=1, temperature=0, logit_bias={str(first): -100}, logprobs=True)
    assert without["choices"][0]["message"]["content"] != served.alone(TURN[0]["content"], 1)


def test_a_conversation_goes_on_from_what_was_seen(served: Served) -> None:
    first = served.ask(messages=[user("Count the goats.")], max_tokens=12, temperature=0)
    text = first["choices"][0]["message"]["content"]
    turns = [user("Count the goats."), {"role": "assistant", "content": text}, user("And the sheep?")]
    said = served.ask(messages=turns, max_tokens=12, temperature=0)
    ids = served.model.tokenizer.chat(turns)
    assert said["choices"][0]["message"]["content"] == served.model.generate(ids, max_tokens=12).text
    used = first["usage"]
    # The model says text here that becomes the same tokens again; other text would not have been seen before.
    begun = ids[: used["prompt_tokens"]]
    assert served.model.tokenizer.encode(text) == list(served.model.generate(begun, max_tokens=12).ids)
    seen = said["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert seen == used["prompt_tokens"] + used["completion_tokens"] - 1


def test_many_clients_get_what_each_would_alone(served: Served) -> None:
    texts = [f"Tell me of {n} {'goats' * (n % 7)}." for n in range(40)]

    def one(text: str) -> str:
        said = served.ask(messages=[user(text)], max_tokens=5 + len(text) % 9, temperature=0)
        return str(said["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, texts))
    assert answers == [served.alone(text, 5 + len(text) % 9) for text in texts]


def test_what_does_not_fit_is_refused_with_the_numbers(served: Served) -> None:
    limit, prompt = served.model.config.max_position_embeddings, len(served.model.tokenizer.chat(TURN))
    error = served.ask(messages=TURN, max_tokens=limit, status=400)["error"]
    assert error["code"] == "context_length_exceeded" and error["type"] == "invalid_request_error"
    assert f"{limit:,} tokens" in error["message"] and f"{prompt + limit:,} tokens" in error["message"]
    error = served.ask(messages=TURN, max_tokens=limit - prompt, status=400)["error"]
    assert error["code"] == "context_length_exceeded" and f"{1 << 26:,}" in error["message"], "of memory"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": "2"}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("inf")}, None),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 80}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"seed": 1 << 70}, "seed"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ["a"] * 17}, None),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"goat": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, None),
        ({"store": True}, "store"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, None),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"quote": True}, "quote"),
    ],
)
def test_what_is_not_understood_is_refused(served: Served, fields: dict[str, object], param: str | None) -> None:
    import json

    reply = served.http.post(
        "/v1/chat/completions",
        content=json.dumps({"messages": TURN, **fields}),
        headers={"Content-Type": "application/json"},
    )
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert param is None or (error["param"] or "").startswith(param), error
    served.alive()


def test_another_model_is_not_there(served: Served) -> None:
    error = served.ask(messages=TURN, model="gpt-4", status=404)["error"]
    assert error["code"] == "model_not_found" and "tiny" in error["message"]
    assert served.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert served.http.get("/v1/models/tiny").json()["max_model_len"] == served.model.config.max_position_embeddings
    assert served.http.get("/v1/models/gpt-4").status_code == 404
