"""Bodies of requests. What a server does not know it refuses, for it might change what is meant."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from herd.engine import Sampler
from herd.server.errors import ApiError

MAX_CHOICES = 16
Text = Annotated[str, Field(max_length=50_000_000)]
Name = Annotated[str, Field(max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=20_000_000)]
Stop = str | Annotated[list[str], Field(max_length=16)] | None


class Body(BaseModel):
    """Strict: a number is no text, and no field is unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Sampled(Body):
    """How tokens are chosen, which all ways to ask have. Ranges are those of `herd.engine.Sampler`."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    repetition_penalty: Annotated[float, Field(le=100)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop = None
    stream: bool | None = None
    user: str | None = None  # these have no meaning here
    metadata: dict[str, JsonValue] | None = None

    def sampler(self, choice: int, temperature: float, logprobs: int | None) -> Sampler:
        """Of one choice of several. temperature: if none is asked for. PromptError for values out of range."""

        def of(value: float | None, default: float) -> float:
            return default if value is None else value

        return Sampler(
            temperature=of(self.temperature, temperature),
            top_p=of(self.top_p, 1.0),
            top_k=self.top_k or 0,
            seed=None if self.seed is None else (self.seed + choice) % (1 << 63),
            min_p=of(self.min_p, 0.0),
            repetition_penalty=of(self.repetition_penalty, 1.0),
            frequency_penalty=of(self.frequency_penalty, 0.0),
            presence_penalty=of(self.presence_penalty, 0.0),
            logprobs=logprobs,
        )

    @property
    def stops(self) -> list[str]:
        """The stop strings. ApiError for one that is empty or too long."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not all(0 < len(stop) <= 1000 for stop in stops):
            raise ApiError(400, "a stop string has 1 to 1,000 characters", param="stop")
        return stops


class StreamOptions(Body):
    """What a stream also says."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # there is none


class TextPart(Body):
    """Text of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: list[JsonValue] | None = None  # of an output_text that comes back
    logprobs: list[JsonValue] | None = None


class ImageUrl(Body):
    """Where an image is: a data URL."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Function(Body):
    """What is called."""

    name: Name
    arguments: Text


class Call(Body):
    """A call that an assistant made."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: Function


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One turn. What an assistant's message has besides may be sent back, and has no meaning."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[Call], Field(max_length=256)] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None
    annotations: list[JsonValue] | None = None
    citations: list[JsonValue] | None = None
    audio: None = None
    function_call: None = None


class Definition(Body):
    """What a tool is for; parameters: a JSON schema."""

    name: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
    description: Text | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: Definition


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer keeps to."""

    name: Name = "answer"
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer is: text, some JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Tools = Annotated[list[Tool], Field(max_length=128)]
Choice = Literal["none", "auto", "required"]


class ChatRequest(Sampled):
    """Of /v1/chat/completions. context, quote: what it is answered from, and whether it is held to quotes of that."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=100_000)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Choice | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    context: Name | Annotated[list[Name], Field(max_length=64)] | None = None
    quote: bool | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionRequest(Sampled):
    """Of /v1/completions."""

    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(max_length=MAX_CHOICES)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: None = None
    suffix: None = None
    stream_options: StreamOptions | None = None


class EmbeddingRequest(Body):
    """Of /v1/embeddings."""

    input: Text | Ids | Annotated[list[Text] | list[Ids], Field(max_length=256)]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    user: str | None = None


class TokenizeRequest(Body):
    """Of /tokenize: a text, or a conversation as it would be asked."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(max_length=100_000)] | None = None
    tools: Tools | None = None


class DetokenizeRequest(Body):
    """Of /detokenize."""

    model: Name | None = None
    tokens: Ids
    keep_special: bool = False


class ContextRequest(Body):
    """Of /v1/contexts. kv, reading: see `herd.Context.open`."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    kv: Literal["int8", "int4", "float32"] | None = None
    reading: Literal["sequential", "independent"] | None = None
