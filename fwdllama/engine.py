"""A loaded base model with its adapter, whose context grows with what it is asked.

Everything that can be refused is refused before the weights are read: the adapter's file, its scope, the model that it
was made for, and the memory that all of it will need.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from fwdllama.errors import AdapterError, UsageError
from fwdllama.llama.adapter import LoadedAdapter
from fwdllama.llama.context import KV_TYPES, Context, ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.machine import check_memory, default_threads
from fwdllama.memory import context_of, engine_options, evaluation
from fwdllama.models import default_cache_dir
from fwdllama.types import Scope
from gguf_tools.adapter import BASE_KEY, Adapter, read_adapter
from gguf_tools.model import file_sha256, read_model_info
from gguf_tools.plan import CELLS, Part, whole_cells
from gguf_tools.validate import validate_adapter

log = logging.getLogger("fwdllama.engine")

MAX_CHOSEN_CTX = 2048  # tokens; a longer context is used only where it is asked for, because of its KV cache


class Engine:
    """A loaded model that answers, with its adapter on or off. Made by `open_engine`; use as a context manager."""

    def __init__(
        self,
        model: Model,
        adapter: LoadedAdapter | None,
        invocation: tuple[int, ...],
        scope: Scope,
        options: ContextOptions,
        n_ctx: int | None,
        resources: ExitStack,
    ) -> None:
        self.model, self.scope, self.n_ctx = model, scope, n_ctx
        self.invocation = invocation  # as the adapter's file names it, empty where it names none
        self._adapter, self._on = adapter, adapter is not None
        self._options, self._resources = options, resources
        self._lora_rank = adapter.rank if adapter is not None else 0
        self._context: Context | None = None

    def set_adapter(self, on: bool) -> None:
        """Answer with the adapter from now on, or with the base model alone.

        Raises:
            UsageError: the engine was opened without an adapter.
        """
        if on and self._adapter is None:
            raise UsageError(f"{self.model.info.path} was opened without an adapter, so none can be switched on.")
        self._on = on
        if self._adapter is not None and self._context is not None:
            self._adapter.attach(self._context, False)

    @property
    def adapter(self) -> LoadedAdapter | None:
        """The adapter where it is on."""
        return self._adapter if self._on else None

    def context_for(self, n_tokens: int) -> Context:
        """A context of as many tokens a sequence as were asked for at opening, else of at least `n_tokens` if possible.

        Raises:
            ResourceError: a larger one is needed than before, and memory is short.
        """
        info = self.model.info
        most = info.context_length if self.n_ctx is not None else min(info.context_length, MAX_CHOSEN_CTX)
        n_ctx = min(most, self.n_ctx if self.n_ctx is not None else whole_cells(n_tokens))
        if self._context is None or self._context.options.n_ctx_seq < n_ctx:
            self._close_context()
            options = replace(self._options, n_ctx_seq=n_ctx)
            check_memory(info.path, context_of(options, Part.whole(info), "the model", lora_rank=self._lora_rank))
            self._context = Context(self.model, options)
        return self._context

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def close(self) -> None:
        """Free the context, then the adapter, then the model. Safe to call twice."""
        self._close_context()
        self._resources.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine(
    model_path: Path,
    *,
    adapter_path: Path | None = None,
    scope: Scope | None = None,
    force_scope: bool = False,
    force_base: bool = False,
    batch: int = 8,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    model_options: ModelOptions = ModelOptions(),  # noqa: B008 (frozen)
    kv_type: str = "f16",
) -> Engine:
    """Load a model, and an adapter that is on from the start.

    `scope` None is the adapter's own; another one than that needs `force_scope`, and another base model than the one
    that the adapter names needs `force_base`. `batch` is questions at a time; `n_ctx` the tokens of each, None to
    choose them by the data; `n_threads` None is one a physical core, or one a fast core where the cores differ.

    Raises:
        UsageError: an option is outside what can work.
        FileError: the model's or the adapter's file is damaged, or they do not fit together.
        AdapterError: the adapter was made for another scope or another base model.
        ResourceError: there is too little memory.
    """
    if kv_type not in KV_TYPES:
        raise UsageError(f"the KV cache type {kv_type!r} is not one of {', '.join(KV_TYPES)}.")
    for name, value in (("batch", batch), ("ctx", n_ctx), ("threads", n_threads)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}, but must be at least 1.")
    info = read_model_info(model_path)
    adapter = None
    if adapter_path is not None:
        validate_adapter(adapter_path, info)
        adapter = read_adapter(adapter_path)
        _check_scope(adapter_path, adapter, scope, force_scope)
        if not force_base:
            check_base(str(adapter_path), adapter, model_path)
    if n_ctx is not None and n_ctx > info.context_length:
        log.warning("%s: its context of %d tokens is used instead of %d", model_path, info.context_length, n_ctx)
    options = engine_options(
        batch=batch, n_ctx=min(n_ctx or CELLS, info.context_length), n_threads=n_threads or default_threads(), kv_type=kv_type
    )
    lora_rank = max(adapter.ranks.values(), default=0) if adapter is not None else 0
    check_memory(model_path, evaluation(info, options, model_options, lora_rank=lora_rank).peak.items)
    with ExitStack() as resources:
        model = resources.enter_context(Model(model_path, model_options))
        loaded = None
        if adapter is not None:
            loaded = LoadedAdapter(model, adapter)
            resources.callback(loaded.close)
        return Engine(
            model,
            loaded,
            adapter.invocation_tokens if adapter is not None else (),
            scope or (adapter.scope if adapter is not None else "answer"),
            options,
            n_ctx,
            resources.pop_all(),
        )


def _check_scope(path: Path, adapter: Adapter, scope: Scope | None, force: bool) -> None:
    if scope is not None and scope != adapter.scope and not force:
        raise AdapterError(
            f"{path}: was trained with scope {adapter.scope!r} and gives wrong answers with scope {scope!r}; "
            f"leave --scope out to use {adapter.scope!r}."
        )


def check_base(label: str, adapter: Adapter, model_path: Path) -> None:
    """An adapter need not name its base model; hashing the model takes seconds, so it is done only where one does.

    Raises:
        AdapterError: it names another one; `label` begins the sentence.
    """
    wanted = adapter.metadata.get(BASE_KEY, "").removeprefix("sha256:")
    if wanted and wanted != (found := file_sha256(model_path, default_cache_dir())):
        raise AdapterError(
            f"{label}: was trained on the base model with SHA-256 {wanted[:12]}, but {model_path} has {found[:12]}. "
            "Use the model that it was trained on."
        )
