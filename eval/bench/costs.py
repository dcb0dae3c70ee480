"""What training costs beside time: a probe against recomputing the prompt, memory against evaluating, and the wait before the first probe.

Short things that are compared alternate, so that a machine that slows down slows both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from .child import Command, in_child, run
from .measure import Bar, Bench, BenchError, Item, Measured
from .runs import train_words

if TYPE_CHECKING:
    from fwdllama.llama.oracle import LlamaOracle
    from fwdllama.space import Space
    from fwdllama.types import Encoded

PROMPT_TOKENS = 190  # of the examples whose probes are timed
N_PROBES, N_ROUNDS, EXAMPLES = 4, 6, 4  # different probes, how often each is timed, and the examples of one
EPS = 0.01  # of a probe; any that is not zero costs the same
MEMORY_ROUNDS = 3
STARTS = 3
FIRST_PROBE = "measuring slopes"  # training says it immediately before its first probe


@dataclass(frozen=True)
class ProbeTimes:
    """Probes of the same examples, in pairs: seconds with the prompts kept and with them recomputed, and tokens decoded in each."""

    answer_s: list[float]
    all_s: list[float]
    answer_tokens: float
    all_tokens: float

    @property
    def ratio(self) -> float:
        """Median over the pairs."""
        return median(a / b for a, b in zip(self.answer_s, self.all_s, strict=True))


def timed_probes(answer: LlamaOracle, whole: LlamaOracle, probes: Sequence[Sequence[int]], n_rounds: int) -> ProbeTimes:
    """Time probes (theta written, the losses of some rows asked) of both oracles in turns; both hold the same examples."""
    from fwdllama.direction import direction

    oracles = (answer, whole)
    seconds: tuple[list[float], list[float]] = ([], [])
    for oracle in oracles:
        oracle.losses(probes[0])  # the first decode of each makes its graph
    tokens = [oracle.n_decoded for oracle in oracles]
    n = n_rounds * len(probes)
    for pair in range(n):
        theta = EPS * direction(pair, answer.space.n_params)
        for side in (pair % 2, 1 - pair % 2):
            begun = time.perf_counter()
            oracles[side].write(theta)
            oracles[side].losses(probes[pair % len(probes)])
            seconds[side].append(time.perf_counter() - begun)
    decoded = [(oracle.n_decoded - before) / n for oracle, before in zip(oracles, tokens, strict=True)]
    return ProbeTimes(*seconds, *decoded)


def near(examples: Sequence[Encoded], n_tokens: int, n: int) -> list[Encoded]:
    """The n examples whose prompts are nearest to n_tokens long, similar lengths of answer beside each other as in training."""
    nearest = sorted(examples, key=lambda e: abs(len(e.prompt) - n_tokens))[:n]
    return sorted(nearest, key=lambda e: len(e.target))


def probe_times(model: str, data: Path, n_probes: int, n_rounds: int) -> tuple[dict[str, ProbeTimes], float]:
    """Times with the whole model and with trunk and top, and the mean length of the prompts in tokens.

    A probe takes EXAMPLES examples of different paragraphs, so recomputing finds no prompt to share; in training a decode holds more, each with
    its own theta, and costs what as many at one theta do (`probe-share`).
    """
    from fwdllama.batches import groups_of
    from fwdllama.config import make_config
    from fwdllama.encode import Encoder, model_template
    from fwdllama.layout import space_of
    from fwdllama.llama.model import Model
    from fwdllama.llama.trunk import cut
    from fwdllama.models import default_cache_dir, resolve
    from fwdllama.tasks.load import load_dataset
    from gguf_tools.model import file_sha256, read_model_info

    config, path = make_config({"budget": {"steps": 1}}), resolve(model)
    info = read_model_info(path)
    space = space_of(config, info)
    found = {}
    with Model(path) as whole:
        encoder = Encoder(whole, model_template(whole, config.template, "squad"))
        units = groups_of(load_dataset(data, limit=500).examples, config.batch.per_unit)
        size = EXAMPLES
        examples = near([encoder.example(unit[0]) for unit in units], PROMPT_TOKENS, n_probes * size)
        probes = [range(start, start + size) for start in range(0, len(examples), size)]
        found["whole"] = _pair(whole, space, examples, None, probes, n_rounds)
    parts = cut(path, file_sha256(path, default_cache_dir()), space.first_layer, default_cache_dir())
    if parts is not None:
        with Model(parts.top, needs_vocabulary=False) as top:
            found["trunk"] = _pair(top, space, examples, parts, probes, n_rounds)
    return found, fmean(len(e.prompt) for e in examples)


def _pair(
    model: Any, space: Space, examples: list[Encoded], parts: Any, probes: Sequence[Sequence[int]], n_rounds: int
) -> ProbeTimes:
    from fwdllama.llama.context import ContextOptions
    from fwdllama.llama.model import ModelOptions
    from fwdllama.llama.oracle import LlamaOracle
    from fwdllama.llama.trunk import Trunk
    from fwdllama.machine import default_threads
    from gguf_tools.plan import whole_cells

    n_ctx = whole_cells(max(e.n_tokens for e in examples))
    options = ContextOptions(n_ctx, len(examples), n_outputs=64, n_threads=default_threads(), flash=False)
    with ExitStack() as resources:
        trunk = None
        if parts is not None:
            trunk = Trunk(parts, options, ModelOptions(), len(examples))
            resources.callback(trunk.close)
        oracles = []
        for scope in ("answer", "all"):
            oracle = resources.enter_context(LlamaOracle(model, space, scope, options, trunk=trunk))
            oracle.load(examples)
            oracles.append(oracle)
        return timed_probes(oracles[0], oracles[1], probes, n_rounds)


def probe_cost(bench: Bench) -> Measured:
    """Time both scopes with the whole model, where the prompt is all that differs, and with the trunk, as training runs."""
    found, prompt_tokens = in_child(probe_times, bench.model, bench.train_data, N_PROBES, N_ROUNDS)
    figures: dict[str, Any] = {"prompt_tokens": prompt_tokens, "pairs": N_PROBES * N_ROUNDS}
    for kind, prefix in (("whole", ""), ("trunk", "trunk_")):
        if kind in found:
            times = found[kind]
            figures |= {
                f"{prefix}ratio": times.ratio,
                f"{prefix}answer_ms": 1000 * median(times.answer_s),
                f"{prefix}all_ms": 1000 * median(times.all_s),
                f"{prefix}answer_tokens": times.answer_tokens,
                f"{prefix}all_tokens": times.all_tokens,
            }
    return Measured(figures, "fwdllama bench probe-cost")


def memory(bench: Bench) -> Measured:
    """Train and evaluate in turns, the evaluation with as many sequences of as many tokens as the training holds."""
    from fwdllama.checkpoint import read_facts
    from fwdllama.config import read_config

    training: list[int] = []
    evaluating: list[int] = []
    figures: dict[str, Any] = {}
    for _ in range(MEMORY_ROUNDS):
        folder = bench.fresh("memory")
        trained = run(bench, *train_words(bench, folder, "--no-warmup", "--steps", 3))
        training.append(trained.peak_bytes)
        facts, batch = read_facts(folder / "run"), read_config(folder / "run" / "config.json").batch
        # What is held out is whole paragraphs, so it may be a few sequences more than was asked for.
        n_seq = facts.get("n_seq", batch.held_out + batch.units * batch.per_unit)
        n_ctx = facts["identity"]["context"]
        options = ("--batch", n_seq, "--ctx", n_ctx, "--limit", bench.questions(n_seq), "--json")
        evaluating.append(run(bench, "eval", "--model", bench.model, "--data", bench.train_data, *options).peak_bytes)
        figures = {"sequences": n_seq, "tokens_of_each": n_ctx, "command": trained.command}
    figures |= {
        "ratio": median(training) / median(evaluating),
        "train_peak_bytes": int(median(training)),
        "eval_peak_bytes": int(median(evaluating)),
        "train_bytes": training,
        "eval_bytes": evaluating,
    }
    return Measured(figures, figures.pop("command"))


def start(bench: Bench) -> Measured:
    """Start `fwdllama train` until it says that its first probe begins; the first time is to warm the disk's cache."""
    seconds = []
    line = ""
    for _ in range(1 + STARTS):
        words = train_words(bench, bench.fresh("start"), "--steps", 1)
        with Command(bench, *words, piped=True) as command:
            line = command.line
            seconds.append(_first_probe_s(command))
    return Measured({"start_s": median(seconds[1:]), "cold_s": seconds[0], "starts": seconds[1:]}, line)


def _first_probe_s(command: Command) -> float:
    assert command.process.stderr is not None
    last = "it said nothing."
    for said in command.process.stderr:
        if FIRST_PROBE in said:
            return time.monotonic() - command.begun
        last = said.strip()
    raise BenchError(f"`{command.line}` ended before its first probe: {last}")


ITEMS = (
    Item(
        "probe-cost",
        "a probe's time with scope answer against recomputing the whole prompt",
        (Bar("ratio", "<=", 0.1),),
        ("ratio", "answer_ms", "all_ms", "answer_tokens", "all_tokens", "trunk_ratio", "trunk_answer_ms", "trunk_all_ms"),
        ("data",),
        1,
        probe_cost,
    ),
    Item(
        "memory",
        "peak memory of training against evaluating the same model and batch",
        (Bar("ratio", "<=", 1.02),),
        ("ratio", "train_peak_bytes", "eval_peak_bytes", "sequences", "tokens_of_each"),
        ("data",),
        4,
        memory,
    ),
    Item(
        "start",
        "`fwdllama train` from process start to the first probe, model on disk",
        (Bar("start_s", "<=", 4),),
        ("start_s", "cold_s"),
        ("data",),
        0.5,
        start,
    ),
)
