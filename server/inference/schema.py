"""What clients send and get, in OpenAI's form. Fields that mean nothing here are passed over; those that would change an answer are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from .fault import Fault

MAX_STOPS = 4  # as OpenAI has it
MAX_CHOICES = 16  # answers that one request may ask for

# Fields of OpenAI's that would change what is answered, and the values of them that change nothing; a completion's `logprobs` 0 is
# not a chat's False.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}

Token = Annotated[int, Field(strict=True)]


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    include_usage: bool = False


class Settings(BaseModel):
    """What requests of both kinds have in common; `max_tokens` None is as many as the kind's own default."""

    model_config = ConfigDict(extra="ignore")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: FiniteFloat = Field(1.0, ge=0, le=2)
    top_p: FiniteFloat = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: list[str] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_change_answers(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise Fault(400, "the body must be a JSON object.")
        for name, neutral in _NEUTRAL.items():
            value = given.get(name)
            if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
                raise Fault(400, f"{name} is not supported by this server; leave it out.", param=name, code="unsupported_parameter")
        return {name: value for name, value in given.items() if value is not None}  # null is what a field is without being given

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_more(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stops: list[str]) -> list[str]:
        if "" in stops:
            raise Fault(400, "stop has an empty string, which occurs everywhere; leave it out.", param="stop")
        return stops


class CompletionRequest(Settings):
    """`POST /v1/completions`: text or token ids to go on from, one or several."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    echo: bool = False

    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return self.prompt  # type: ignore[return-value]  # of lists, what begins with no number holds texts or lists


class TextPart(BaseModel):
    """A piece of a message; this server knows no pictures or sounds."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Settings):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelCard(BaseModel):
    """A model that may be named in a request."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fwdllama"


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class AdapterStatus(BaseModel):
    """`GET /v1/adapter`: what the model id `model` answers with. `since` is in seconds since 1970; without an adapter all but `model` are null."""

    model: str | None
    version: int | None = None
    digest: str | None = None
    sha256: str | None = None
    scope: Literal["answer", "all"] | None = None
    since: float | None = None
