"""The routes. What they do is elsewhere: `schema` checks, `prompt` makes tokens, `call` asks the engine, `form` writes the answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from fwdllama import __version__
from fwdllama.errors import DataError
from fwdllama.tasks.conversation import Message

from .call import Call, EventStream, unless_gone
from .engine import Engine
from .exchange import Asked, Started
from .fault import Fault
from .form import Form
from .gate import Gate
from .prompt import chat_tokens, raw_tokens, text_of
from .sampling import Sampling
from .schema import MAX_CHOICES, AdapterStatus, ChatRequest, CompletionRequest, ModelCard, ModelList, Settings

ADAPTER_HEADER = "x-fwdllama-adapter"
COMPLETION_TOKENS = 16  # where a completion names no number, as OpenAI has it; a chat goes on to its end
GONE = Response(status_code=499)  # nobody reads it


@dataclass(frozen=True)
class Service:
    """An engine and the names that its model goes by; `tuned_id` None where no adapter is ever expected."""

    engine: Engine
    base_id: str
    tuned_id: str | None = None
    key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()  # of web pages that may ask
    created: int = field(default_factory=lambda: int(time.time()))

    def ids(self) -> list[str]:
        """Models that can be asked now."""
        return [self.base_id, *([self.tuned_id] if self.tuned_id and self.engine.current else [])]

    def is_tuned(self, model: str) -> bool:
        """Whether a model id means the adapter.

        Raises:
            Fault: it means nothing.
        """
        known = [self.base_id, *([self.tuned_id] if self.tuned_id else [])]
        if model not in known:
            raise Fault(404, f"the model {model[:100]!r} does not exist; there is {' and '.join(known)}.", param="model", code="model_not_found")
        return model != self.base_id


def make_app(service: Service) -> FastAPI:
    """The application around an engine that is open."""
    app = FastAPI(title="fwdllama model server", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, key=service.key)
    if service.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.origins, allow_methods=["GET", "POST"], allow_headers=["authorization", "content-type"],
            expose_headers=[ADAPTER_HEADER],
        )  # fmt: skip
    app.add_exception_handler(Fault, _as_response)
    app.add_exception_handler(RequestValidationError, _as_response)
    app.add_exception_handler(HTTPException, _as_response)
    app.add_exception_handler(Exception, _as_response)
    _add_answers(app, service)
    _add_state(app, service)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    model = service.engine.model

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Text that goes on from a prompt."""
        tuned = service.is_tuned(asked.model)
        prompts = asked.prompts()
        n_answers = len(prompts) * asked.n
        if not 1 <= n_answers <= MAX_CHOICES:
            wrong = f"{len(prompts)} prompts with n = {asked.n} ask for {n_answers} answers"
            raise Fault(400, f"{wrong}, but a request may ask for 1 to {MAX_CHOICES}.", param="prompt")
        encoded = await _encoded("prompt", lambda: [raw_tokens(model, prompt) for prompt in prompts])
        before = [(text_of(model, tokens) if asked.echo else "") for tokens in encoded for _ in range(asked.n)]
        return await _answer(service, request, "completion", asked, tuned, encoded, asked.max_tokens or COMPLETION_TOKENS, before)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """The next turn of a conversation."""
        tuned = service.is_tuned(asked.model)
        messages = [Message("system" if turn.role == "developer" else turn.role, turn.text()) for turn in asked.messages]
        encoded = await _encoded("messages", lambda: [chat_tokens(model, messages)])
        n_most = asked.max_completion_tokens or asked.max_tokens
        return await _answer(service, request, "chat", asked, tuned, encoded, n_most, [""] * asked.n)


async def _encoded(param: str, encode: Any) -> list[tuple[int, ...]]:
    """Tokens of a request, computed beside the event loop: a megabyte of text takes a while."""
    try:
        tokens: list[tuple[int, ...]] = await asyncio.to_thread(encode)
    except DataError as error:
        raise Fault(400, str(error), param=param) from error
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        wrong = f"{error.object[error.start]!r} at character {error.start}"
        raise Fault(400, f"the {param} cannot be written as UTF-8: {wrong} is no character.", param=param) from error
    return tokens


async def _answer(
    service: Service,
    request: Request,
    kind: Literal["completion", "chat"],
    asked: Settings,
    tuned: bool,
    prompts: Sequence[tuple[int, ...]],
    n_most: int | None,
    before: Sequence[str],
) -> Response:
    n_ctx = service.engine.n_ctx
    longest = max(map(len, prompts))
    if longest + (n_most or 1) > n_ctx:
        wanted = f"{longest} tokens of prompt and {n_most or 1} of answer are {longest + (n_most or 1)}"
        raise Fault(400, f"{wanted}, but the context has {n_ctx}.", param="messages" if kind == "chat" else "prompt", code="context_length_exceeded")
    sampling = Sampling(asked.temperature, asked.top_p, asked.seed)
    jobs = [Asked(tokens, n_most or n_ctx - len(tokens), sampling, tuple(asked.stop)) for tokens in prompts for _ in range(asked.n)]
    call = Call(service.engine, jobs, tuned=tuned)
    streams = False
    try:
        started = await unless_gone(request, call.started())
        if started is None:
            return GONE
        headers = {ADAPTER_HEADER: _adapter_header(started)}
        form = Form(
            kind,
            f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}",
            int(time.time()),
            asked.model,
            started.edition.name if started.edition is not None and any(started.on) else "base",
            with_usage=asked.stream and asked.stream_options.include_usage,
        )
        if asked.stream:
            streams = True
            return EventStream(call, form, before, headers)
        body = await unless_gone(request, call.whole(form, before))
        return GONE if body is None else JSONResponse(body, headers=headers)
    finally:
        if not streams:
            call.cancel()


def _adapter_header(started: Started) -> str:
    """With what a request is answered."""
    if started.edition is None:
        return "off (base)"
    n_on = sum(started.on)
    if not n_on:
        return "off (no invocation)"
    some = f" for {n_on} of {len(started.on)}" if n_on < len(started.on) else ""
    return f"on ({started.edition.name}){some}"


def _add_state(app: FastAPI, service: Service) -> None:
    def card(id: str) -> ModelCard:
        return ModelCard(id=id, created=service.created)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """Models that can be asked: the base, and with the adapter once there is one."""
        return ModelList(data=[card(id) for id in service.ids()])

    @app.get("/v1/models/{id}")
    async def model(id: str) -> ModelCard:
        """One of them."""
        service.is_tuned(id)
        return card(id)

    @app.get("/v1/adapter")
    async def adapter() -> AdapterStatus:
        """Which version of the adapter the next request is answered with."""
        current = service.engine.current
        if current is None:
            return AdapterStatus(model=service.tuned_id)
        edition, since = current
        return AdapterStatus(
            model=service.tuned_id, version=edition.version, digest=edition.digest, sha256=edition.sha256, scope=edition.scope, since=since
        )

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this process works at all."""
        if not service.engine.alive:
            raise Fault(503, "the engine has stopped.")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether it can answer with all that it is expected to: the adapter too, once one has arrived."""
        await health()
        if service.tuned_id is not None and service.engine.current is None:
            raise Fault(503, "no version of the adapter has arrived yet.", code="no_adapter")
        return {"status": "ready"}


async def _as_response(request: Request, error: Exception) -> Response:
    """Every failure in OpenAI's form."""
    if isinstance(error, RequestValidationError):
        fault = _first_complaint(error)
    elif isinstance(error, HTTPException):
        what = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not possible at {request.url.path}"}
        text = str(error.detail).rstrip(".")
        fault = Fault(error.status_code, f"{what.get(error.status_code, text[:1].lower() + text[1:])}.")
    elif isinstance(error, Fault):
        fault = error
    else:
        fault = Fault(500, "the server has failed; its log says where.")
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if fault.status == 429:
        headers["Retry-After"] = "2"
    return JSONResponse(fault.body(), fault.status, headers)


def _first_complaint(error: RequestValidationError) -> Fault:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Fault(400, f"the body is not JSON: {first['ctx']['error'][:1].lower()}{first['ctx']['error'][1:]}.")
    # of a union only the first way is complained about; which one was meant cannot be known
    param = ".".join(where) or None
    message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    given = "" if first["type"] == "missing" else f", but is {first.get('input')!r:.60}"
    return Fault(400, f"{param or 'the body'}: {message}{given}.", param=where[0] if where else None)
