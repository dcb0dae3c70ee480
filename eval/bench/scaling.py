"""What a probe costs against each size that it depends on, one at a time around the usual ones.

Tokens are random: a decode costs the same whatever they are. A probe is what training does for one: theta is written and some examples' losses
are asked for. What is loaded before it (prompts, and the layers below the adapter) is timed apart, because several probes share it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from .child import in_child
from .measure import Bench, Item, Measured

if TYPE_CHECKING:
    from fwdllama.llama.model import Model
    from fwdllama.llama.trunk import Parts
    from fwdllama.types import Encoded, Scope
    from gguf_tools.model import ModelInfo

PROMPT, SIZE, RANK, BEHIND = 160, 4, 4, 10  # the usual: tokens of a prompt, examples of a probe, rank; and tokens behind the prompt
TOKENS = (32, 64, 128, 256, 384)
SIZES = (1, 2, 4, 8, 16)
RANKS = (1, 2, 4, 8, 16, 32)
DEPTHS = (0.0, 0.2, 0.4, 2 / 3, 0.8)  # of the first trained layer
PROBES = (1, 2, 4, 8, 16, 32)  # of a batch
N_LAYERS = 6  # trained
N_TIMED = 7
EPS = 0.01


class Cost(NamedTuple):
    """Seconds to load some examples, and of one probe of all of them, the median of several."""

    load_s: float
    probe_s: float


def examples_of(n: int, n_prompt: int, n_vocab: int) -> list[Encoded]:
    """Examples of random tokens: a prompt, two tokens that switch the adapter on, and an answer."""
    import numpy as np

    from fwdllama.types import Encoded

    rng = np.random.default_rng(n_prompt)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(n_vocab // 2, n_vocab, count))

    return [Encoded(str(i), tokens(n_prompt), tokens(2), tokens(BEHIND - 1)) for i in range(n)]


def cost(
    model: Model,
    examples: list[Encoded],
    *,
    scope: Scope = "answer",
    rank: int = RANK,
    first: int | None = None,
    parts: Parts | None = None,
    info: ModelInfo | None = None,
    n_timed: int = N_TIMED,
) -> Cost:
    """Load and probe. `first` is the first trained layer, by default the usual; with `parts`, `model` is their top and `info` the whole."""
    from fwdllama.config import layer_band, make_config
    from fwdllama.direction import direction
    from fwdllama.layout import space_of
    from fwdllama.llama.context import ContextOptions
    from fwdllama.llama.model import ModelOptions
    from fwdllama.llama.oracle import LlamaOracle
    from fwdllama.llama.trunk import Trunk
    from fwdllama.machine import default_threads
    from gguf_tools.plan import whole_cells

    info = info or model.info
    start = layer_band(info.n_layers)[0] if first is None else first
    layers = (start, min(start + N_LAYERS, info.n_layers) - 1)
    space = space_of(make_config({"budget": {"steps": 1}, "space": {"rank": rank, "layers": layers, "init": "random"}}), info)
    n_ctx = whole_cells(max(e.n_tokens for e in examples))
    options = ContextOptions(n_ctx, len(examples), n_outputs=max(64, len(examples)), n_threads=default_threads(), flash=False)
    rows = range(len(examples))
    with ExitStack() as resources:
        trunk = None
        if parts is not None:
            trunk = Trunk(parts, options, ModelOptions(), len(examples))
            resources.callback(trunk.close)
        oracle = resources.enter_context(LlamaOracle(model, space, scope, options, trunk=trunk))
        begun = time.perf_counter()
        oracle.load(examples)
        load_s = time.perf_counter() - begun
        oracle.losses(rows)  # the first decode makes the graph
        seconds = []
        for seed in range(n_timed):
            theta = EPS * direction(seed, space.n_params)
            begun = time.perf_counter()
            oracle.write(theta)
            oracle.losses(rows)
            seconds.append(time.perf_counter() - begun)
        return Cost(load_s, median(seconds))


def curves(name: str, cache: Path, n_timed: int = N_TIMED) -> dict[str, Any]:
    """Every curve: lists of (x, milliseconds)."""
    from fwdllama.llama.model import Model
    from fwdllama.models import resolve

    path = resolve(name)
    with Model(path) as model:
        n_layers = model.n_layers

        def at(n: int = SIZE, n_prompt: int = PROMPT, scope: Scope = "answer", rank: int = RANK, first: int | None = None) -> Cost:
            # A probe with prompts takes as long as dozens without: fewer are enough.
            timed = n_timed if scope == "answer" else max(1, n_timed // 3)
            return cost(model, examples_of(n, n_prompt, model.n_vocab), scope=scope, rank=rank, first=first, n_timed=timed)

        def probe_ms(xs: tuple[int, ...], found: list[Cost]) -> list[tuple[float, float]]:
            return [(x, 1000 * each.probe_s) for x, each in zip(xs, found, strict=True)]

        tokens = {scope: probe_ms(TOKENS, [at(n_prompt=n, scope=scope) for n in TOKENS]) for scope in ("answer", "all")}
        sizes = probe_ms(SIZES, [at(n) for n in SIZES])
        ranks = probe_ms(RANKS, [at(rank=rank) for rank in RANKS if rank <= model.n_embd])
        usual = at()
        firsts = tuple(sorted({min(round(depth * n_layers), n_layers - 1) for depth in DEPTHS}))
        whole = probe_ms(firsts, [at(first=first) for first in firsts])
    top = [(first, 1000 * each.probe_s) for first in firsts if (each := above(path, cache, first, n_timed)) is not None]
    return {
        "tokens_answer": tokens["answer"],
        "tokens_all": tokens["all"],
        "sizes": sizes,
        "sizes_each": [(x, ms / x) for x, ms in sizes],
        "ranks": ranks,
        "firsts_whole": whole,
        "firsts_top": top,
        "probes": [(n, 1000 * (usual.load_s / n + usual.probe_s)) for n in PROBES],
        "load_ms": 1000 * usual.load_s,
        "probe_ms": 1000 * usual.probe_s,
        "n_layers": n_layers,
    }


def above(path: Path, cache: Path, first: int, n_timed: int) -> Cost | None:
    """A probe of the layers from `first` on, what enters them kept; None where the model is not cut there."""
    from fwdllama.llama.model import Model
    from fwdllama.llama.trunk import cut
    from gguf_tools.model import file_sha256, read_model_info

    parts = cut(path, file_sha256(path, cache), first, cache)
    if parts is None:
        return None
    with Model(parts.top, needs_vocabulary=False) as top:
        found = cost(top, examples_of(SIZE, PROMPT, top.n_vocab), first=first, parts=parts, info=read_model_info(path), n_timed=n_timed)
    parts.trunk.unlink()
    parts.top.unlink()
    return found


def scaling(bench: Bench) -> Measured:
    """All curves in one process, one after the other."""
    with TemporaryDirectory(dir=bench.work) as cache:
        found = in_child(curves, bench.model, Path(cache))
    return Measured({**figures_of(found), "curves": found}, "fwdllama bench scaling")


def figures_of(found: dict[str, Any]) -> dict[str, Any]:
    """Ratios of it: one example against its share of sixteen, and the top third alone against the whole model."""
    sizes, whole, top = dict(found["sizes"]), dict(found["firsts_whole"]), dict(found["firsts_top"])
    third = next((first for first in sorted(top) if first >= 0.6 * found["n_layers"]), None)
    return {
        "one_of_16": sizes[1] / (sizes[16] / 16),
        "top_third_gain": None if third is None else whole[third] / top[third],
        "probe_ms": found["probe_ms"],
        "load_ms": found["load_ms"],
    }


ITEMS = (
    Item(
        "scaling",
        "a probe's time against tokens, examples, trained layers, rank and probes of a batch",
        (),
        ("one_of_16", "top_third_gain", "probe_ms", "load_ms"),
        (),
        2,
        scaling,
    ),
)
