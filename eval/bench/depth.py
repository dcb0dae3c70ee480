"""A probe of a staged run against one of an unstaged run that computes every layer: what the layers below the adapter cost.

Both are timed in turns on the same random examples. In scope `answer` the output matrix, which is computed for nearly every token of an answer, is a
large share of a small model's probe and a small one of a large model's; in scope `all` it hardly counts.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from .child import in_child
from .measure import Bar, Bench, Item, Measured
from .scaling import N_LAYERS, examples_of
from .speed import EPS, LARGE, alternating

DEPTH = 2 / 3  # of the first trained layer
ROUNDS, FEW_ROUNDS = 15, 3
PROMPT, SHORT_PROMPT = 160, 32  # tokens; a large model's prompts take seconds, and its probes do not depend on them


def gains(model: str, n: int, n_prompt: int, n_rounds: int, scopes: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds of probes of n examples, each at a theta of its own in scope `answer`, with the top alone and with all layers."""
    from fwdllama.config import make_config
    from fwdllama.direction import moved, packed_bits
    from fwdllama.layout import space_of
    from fwdllama.llama.context import ContextOptions
    from fwdllama.llama.model import Model, ModelOptions
    from fwdllama.llama.oracle import LlamaOracle
    from fwdllama.llama.trunk import Trunk, cut
    from fwdllama.machine import default_threads
    from fwdllama.models import default_cache_dir, resolve
    from fwdllama.shortlist import usual_shortlist
    from gguf_tools.model import file_sha256, read_model_info
    from gguf_tools.plan import whole_cells

    path = resolve(model)
    info = read_model_info(path)
    first = round(DEPTH * info.n_layers)
    layers = (first, min(first + N_LAYERS, info.n_layers) - 1)
    space = space_of(make_config({"budget": {"steps": 1}, "space": {"layers": layers, "init": "random"}}), info)
    shortlist = usual_shortlist(info.n_vocab)
    parts = cut(path, file_sha256(path, default_cache_dir()), first, default_cache_dir(), shortlist=shortlist)
    assert parts is not None
    examples = examples_of(n, n_prompt, info.n_vocab if shortlist is None else len(shortlist))
    options = ContextOptions(whole_cells(examples[0].n_tokens), n, n_outputs=n * 16, n_threads=default_threads(), flash=False)
    found: dict[str, float] = {}
    for scope in scopes:
        with ExitStack() as resources:
            trunk = Trunk(parts, options, ModelOptions(), 1)
            resources.callback(trunk.close)
            top, whole = (resources.enter_context(Model(file, needs_vocabulary=file == path)) for file in (parts.top, path))
            oracles = {
                "top": resources.enter_context(LlamaOracle(top, space, scope, options, trunk=trunk, shortlist=shortlist, n_places=n)),  # type: ignore[arg-type]
                "whole": resources.enter_context(LlamaOracle(whole, space, scope, options, n_places=n)),  # type: ignore[arg-type]
            }

            def probe(oracle: LlamaOracle, seed: int) -> None:
                theta = oracle.space.initial_theta()
                if oracle.n_places == 1:
                    oracle.write(moved(theta, packed_bits(seed, theta.size), EPS))
                    oracle.losses()
                    return
                for place in range(n):
                    oracle.place(place, moved(theta, packed_bits(seed + place, theta.size), EPS))
                oracle.losses_beside([[row] for row in range(n)])

            for oracle in oracles.values():
                oracle.load(examples)
            seconds = alternating({name: partial(probe, oracle) for name, oracle in oracles.items()}, n_rounds)
            found |= {f"{name}_{scope}_ms": 1000 * each for name, each in seconds.items()}
            found[f"gain_{scope}"] = seconds["whole"] / seconds["top"]
    return found


def probe_staged(bench: Bench) -> Measured:
    """Time both; a large model in scope `answer` alone."""
    from fwdllama.models import resolve

    large = resolve(bench.model).stat().st_size >= LARGE
    words: tuple[Any, ...] = (4, SHORT_PROMPT, FEW_ROUNDS, ("answer",)) if large else (16, PROMPT, ROUNDS, ("answer", "all"))
    return Measured(in_child(gains, bench.model, *words), "fwdllama bench probe-staged")


ITEMS = (
    Item(
        "probe-staged",
        "a probe of the upper third of the layers, as in a staged run, against one of all layers",
        (Bar("gain_answer", ">=", 2.2),),
        ("gain_answer", "gain_all", "top_answer_ms", "whole_answer_ms"),
        (),
        1,
        probe_staged,
    ),
)
