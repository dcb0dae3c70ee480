"""What a probe costs: against its share of a large batch, against a naive loop, against llama.cpp alone; and time that is not llama.cpp's.

Only times count in the first three, so their examples are random tokens, of equal length: nothing is padded, and any model can be given.
What is compared alternates, because a machine that slows down must slow both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .child import in_child, run
from .measure import Bar, Bench, Item, Measured
from .runs import decode_shares, train_words

if TYPE_CHECKING:
    from fwdllama.llama.oracle import LlamaOracle
    from fwdllama.types import Encoded

PROMPT_TOKENS, ANSWER_TOKENS = 160, 7  # a SQuAD question on a short paragraph, and a usual answer
BATCH = 16
ROUNDS = 15
NAIVE_ROUNDS = 5
EPS = 0.01  # of a probe; any that is not zero costs the same
LARGE = 2e9  # weights from which on a model counts as one of the 7B kind
ALLOWED = {False: 0.06, True: 0.005}  # share of a step's time outside llama_decode: small models, large ones
STEPS = 6
# Steps of a large model.
FEW = ("--no-warmup", "--steps", 2, "--units", 8, "--per-unit", 1, "--fresh", 1, "--held-out", 2, "--rounds", 4, "--init", "random", "--eps", EPS)


def random_examples(n: int, n_vocab: int) -> list[Encoded]:
    """Examples of equal lengths."""
    import numpy as np

    from fwdllama.types import Encoded

    tokens = np.random.default_rng(0).integers(3, n_vocab, (n, PROMPT_TOKENS + 2 + ANSWER_TOKENS)).tolist()
    return [Encoded(str(i), tuple(row[:PROMPT_TOKENS]), tuple(row[PROMPT_TOKENS:][:2]), tuple(row[-ANSWER_TOKENS:])) for i, row in enumerate(tokens)]


@contextmanager
def oracles(model: str, n_places: int, *, naive: bool = False) -> Iterator[dict[str, LlamaOracle]]:
    """Oracles with a batch of random examples: `ours` as training makes it; `naive`, if wanted, loads an adapter file before every loss."""
    from contextlib import ExitStack

    from fwdllama.config import make_config
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
    space = space_of(make_config({"budget": {"steps": 1}, "space": {"init": "random"}}), info)
    n_ctx = whole_cells(PROMPT_TOKENS + 2 + ANSWER_TOKENS)
    options = ContextOptions(n_ctx, BATCH, n_outputs=BATCH * ANSWER_TOKENS, n_threads=default_threads(), flash=False)
    with ExitStack() as resources:
        shortlist = usual_shortlist(info.n_vocab)
        parts = cut(path, file_sha256(path, default_cache_dir()), space.first_layer, default_cache_dir(), shortlist=shortlist)
        opened = resources.enter_context(Model(parts.top if parts else path, needs_vocabulary=parts is None))
        trunk = None
        if parts:
            trunk = Trunk(parts, options, ModelOptions(), 1)
            resources.callback(trunk.close)
        of = parts.shortlist if parts else None
        found = {"ours": resources.enter_context(LlamaOracle(opened, space, "answer", options, trunk=trunk, shortlist=of, n_places=n_places))}
        if naive:
            whole = resources.enter_context(Model(path))
            found["naive"] = resources.enter_context(LlamaOracle(whole, space, "all", options, writing="temp-file"))
        examples = random_examples(BATCH, opened.n_vocab)
        for oracle in found.values():
            oracle.load(examples)
        yield found


def _beside(oracle: LlamaOracle, size: int, seed: int) -> None:
    """Probes of `size` examples each, of all examples of the batch."""
    from fwdllama.direction import moved, packed_bits

    theta = oracle.space.initial_theta()
    groups = [range(start, start + size) for start in range(0, BATCH, size)]
    for place in range(len(groups)):
        oracle.place(place, moved(theta, packed_bits(seed + place, theta.size), EPS))
    oracle.losses_beside(groups)


def _alone(oracle: LlamaOracle, rows: Sequence[int], seed: int) -> None:
    """One probe of these rows."""
    from fwdllama.direction import moved, packed_bits

    theta = oracle.space.initial_theta()
    oracle.write(moved(theta, packed_bits(seed, theta.size), EPS))
    oracle.losses(rows)


def alternating(acts: dict[str, Callable[[int], None]], n_rounds: int) -> dict[str, float]:
    """Median seconds of each act over the rounds, in each of which every act has its turn; one round more comes first, and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(1 + n_rounds):
        for name in list(acts)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            acts[name](turn)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: median(values) for name, values in seconds.items()}


def share_times(model: str) -> dict[str, float]:
    """Seconds of a probe of one example among others, of one by itself, and of a sixteenth of a batch that shares one theta."""
    with oracles(model, BATCH) as found:
        ours = found["ours"]
        acts = {
            "beside": lambda turn: _beside(ours, 1, turn),
            "batch": lambda turn: _alone(ours, range(BATCH), turn),
            "alone": lambda turn: _alone(ours, [turn % BATCH], turn),
        }
        seconds = alternating(acts, ROUNDS)
    return {"beside": seconds["beside"] / BATCH, "batch": seconds["batch"] / BATCH, "alone": seconds["alone"], "n_places": ours.n_places}


def probe_share(bench: Bench) -> Measured:
    """Time them."""
    found = in_child(share_times, bench.model)
    figures = {
        "ratio": found["beside"] / found["batch"],
        "ratio_by_itself": found["alone"] / found["batch"],
        **{f"{name}_ms": 1000 * found[name] for name in ("beside", "alone", "batch")},
        "probes_in_a_decode": found["n_places"],
    }
    return Measured(figures, "fwdllama bench probe-share")


def naive_times(model: str) -> dict[str, float]:
    """Seconds of a probe of one example: ours, and with a whole model, a whole prompt and an adapter that is written and loaded."""
    with oracles(model, BATCH, naive=True) as found:
        ours, naive = found["ours"], found["naive"]
        acts = {
            "ours": lambda turn: _beside(ours, 1, turn),
            "by_itself": lambda turn: _alone(ours, [turn % BATCH], turn),
            "naive": lambda turn: _alone(naive, [turn % BATCH], turn),
        }
        seconds = alternating(acts, NAIVE_ROUNDS)
    return {**seconds, "ours": seconds["ours"] / BATCH}


def probe_naive(bench: Bench) -> Measured:
    """Time both."""
    found = in_child(naive_times, bench.model)
    figures = {"factor": found["naive"] / found["ours"], "factor_by_itself": found["naive"] / found["by_itself"]}
    figures |= {f"{name}_ms": 1000 * seconds for name, seconds in found.items()}
    return Measured({**figures, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}, "fwdllama bench probe-naive")


def throughputs(model: str) -> dict[str, float]:
    """Tokens a second of probes, and of llama_decode given the same tokens and no adapter."""
    with oracles(model, BATCH) as found:
        ours = found["ours"]
        before = ours.n_decoded
        _beside(ours, 1, 0)
        n_tokens = ours.n_decoded - before
        seconds: dict[str, list[float]] = {"probes": [], "raw": []}
        for turn in range(ROUNDS):
            begun = time.perf_counter()
            _beside(ours, 1, turn)
            seconds["probes"].append(time.perf_counter() - begun)
            ours.adapter.attach(ours.context, False)
            ours.losses()  # switching the adapter rebuilds graphs and buffers
            inside = ours.context.decode_s
            ours.losses()
            seconds["raw"].append(ours.context.decode_s - inside)
            ours.adapter.attach(ours.context, True)
            ours.losses()
    return {name: n_tokens / median(values) for name, values in seconds.items()}


def throughput(bench: Bench) -> Measured:
    """Time both."""
    found = in_child(throughputs, bench.model)
    figures = {"ratio": found["probes"] / found["raw"], "probe_rate": found["probes"], "raw_rate": found["raw"]}  # tokens a second
    return Measured(figures, "fwdllama bench throughput")


def outside_decode(bench: Bench) -> Measured:
    """Train a few steps; of a large model small ones with short prompts, in which whatever is not a decode weighs more than in a usual step."""
    from fwdllama.models import resolve
    from gguf_tools.model import read_model_info

    n_weights = sum(_product(shape) for shape, _ in read_model_info(resolve(bench.model)).tensors.values())
    large = n_weights >= LARGE
    folder = bench.fresh("outside-decode")
    if large:
        words = train_words(bench, folder, *FEW, data=short_pairs(folder / "pairs.jsonl"))
    else:
        words = train_words(bench, folder, "--no-warmup", "--steps", STEPS)
    ran = run(bench, *words)
    shares = decode_shares(folder / "run")
    outside = 1 - shares["decode_share_of_steps"]
    figures: dict[str, Any] = {
        "outside": outside,
        "of_allowed": outside / ALLOWED[large],
        "allowed": ALLOWED[large],
        "outside_of_worst_step": 1 - shares["decode_share_of_worst_step"],
        "probes": ran.json["probes"],
    }
    return Measured(figures, ran.command)


def short_pairs(path: Path) -> Path:
    """Questions that are a few tokens long in any vocabulary, written to `path`."""
    lines = (json.dumps({"prompt": f"Which number comes after {number}?", "answer": f"It is {number + 1}"}) for number in range(100, 160))
    path.write_text("\n".join(lines) + "\n")
    return path


def _product(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


ITEMS = (
    Item(
        "probe-share",
        "a probe of one example against its share of a batch of 16",
        (Bar("ratio", "<=", 1.4),),
        ("ratio", "ratio_by_itself", "beside_ms", "alone_ms", "batch_ms"),
        (),
        1,
        probe_share,
    ),
    Item(
        "probe-naive",
        "a probe against a naive loop: whole model and prompt, an adapter file a probe",
        (Bar("factor", ">=", 12),),
        ("factor", "factor_by_itself", "ours_ms", "naive_ms", "prompt_tokens"),
        (),
        0.5,
        probe_naive,
    ),
    Item(
        "throughput",
        "tokens a second of probes against llama_decode of the same tokens",
        (),
        ("ratio", "probe_rate", "raw_rate"),
        (),
        0.5,
        throughput,
    ),
    Item(
        "outside-decode",
        "time of a training step outside llama_decode: 6 % of a small model's, 0.5 % of a 7B model's",
        (Bar("of_allowed", "<=", 1),),
        ("outside", "allowed", "of_allowed", "outside_of_worst_step", "probes"),
        ("data",),
        2,
        outside_decode,
    ),
)
