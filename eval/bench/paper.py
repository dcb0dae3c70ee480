"""The paper's table on a small model: forward-only training in each of its ways against back-propagation, on bases of 16, 8 and 4 bits.

Everything trains the same numbers from the same start, with as many threads, for as long, on examples of the same file. Memory is that of a
whole fresh process which holds eight examples (a run's usual batch is larger, and its peak is given too); losses are of the same unseen
questions, and what measures them takes no time of either side. torch computes in float32, because half precision is slower on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .backprop_race import BATCH, Job, adamw, replayed_run
from .child import in_child, peak_of, read_state, run
from .curve import Curve, Point, asking, reached
from .measure import Bar, Bench, BenchError, Item, Measured, Need, variant_of
from .runs import STAGED, base_scores, scores, train_words

BASES: tuple[Need, ...] = ("fp16", "int8", "int4")
SECONDS = 120.0  # of training, for each row
LOSSES = (1.6, 1.32, 1.1)  # nats per answer token
GOAL = 1.1
N_QUESTIONS, N_SCORED = 32, 100  # whose loss is watched, and that are answered
N_POINTS = 12  # losses of a curve where one costs seconds
RATE = 3e-3  # of AdamW, the best of the race
WINDOW = 256  # tokens of a step of llama.cpp's optimiser
# Two steps with eight examples, and as many that are watched; nothing is calibrated.
SMALL = ("--units", 8, "--per-unit", 1, "--fresh", 8, "--held-out", 8, "--rounds", 1, "--eps", 0.02, "--steps", 2)
FORWARD: dict[str, tuple[str, ...]] = {"answer": ("--scope", "answer"), "all": ("--scope", "all"), "staged": STAGED}

Row = dict[str, Any]


def table(base: str, bench: Bench) -> Measured:
    """Every row of one base."""
    model = variant_of(bench.model, base)
    if model is None:
        raise BenchError(f"{bench.model} has no {base.upper()} variant.")
    upload = upload_bytes(bench)
    rows: dict[str, Row] = {}
    command, jobs = "", dict[str, Job]()
    for name, words in FORWARD.items():
        ran, jobs[name], rows[f"forward-only, {name}"] = forward_row(bench, base, model, name, words)
        rows[f"forward-only, {name}"]["upload_bytes"] = upload
        command = command or ran
    sizes = numbers_of(jobs["answer"].initial)
    for name in ("answer", "all"):
        rows[f"torch, {name}"] = torch_row(bench, base, model, jobs[name])
    rows["llama.cpp's optimiser, all"] = ggml_row(bench, base, model, jobs["all"])
    for name, row in rows.items():
        if not name.startswith("forward"):
            row |= {"upload_bytes": 4 * sizes["trained"], "upload_all_bytes": 4 * sizes["all"]}
    return Measured({**headline(rows), **sizes, "base": base_scores(bench, model, N_SCORED), "rows": rows}, command)


def headline(rows: dict[str, Row]) -> dict[str, Any]:
    """The figures that a line has room for, scope `answer` on both sides."""
    ours, theirs = rows["forward-only, answer"], rows["torch, answer"]
    mine, other = ours["seconds_to"][str(GOAL)], theirs["seconds_to"][str(GOAL)]
    return {
        "memory_ratio": ours["memory_bytes"] / theirs["memory_bytes"],
        "time_ratio": mine / other if mine and other else None,
        "forward_memory_bytes": ours["memory_bytes"],
        "torch_memory_bytes": theirs["memory_bytes"],
        "forward_f1": ours["f1"],
        "torch_f1": theirs["f1"],
    }


def row_of(curve: Curve, memory_bytes: int, scored: dict[str, float]) -> Row:
    """What every row has."""
    points = {loss: reached(curve, loss) for loss in LOSSES}
    return {
        "memory_bytes": memory_bytes,
        "seconds_to": {str(loss): point.seconds if point else None for loss, point in points.items()},
        "passes_to": {str(loss): point.passes if point else None for loss, point in points.items()},
        "best_loss": min(point.loss for point in curve),
        "passes": curve[-1].passes,
        **{key: scored[key] for key in ("f1", "exact_match")},
        "curve": curve,
    }


def forward_row(bench: Bench, base: str, model: str, name: str, words: Sequence[object]) -> tuple[str, Job, Row]:
    """Train through the command line; the command, what the other side gets, and the row."""
    folder = bench.fresh(f"paper-{base}-{name}")
    ran = run(bench, *train_words(bench, folder, "--seconds", f"{bench.seconds(SECONDS):g}", *words, model=model))
    small = run(bench, *train_words(bench, bench.fresh("paper-small"), *SMALL, *words, model=model))
    curve, job, _ = in_child(replayed_run, folder / "run", bench.dev_data, N_QUESTIONS, floor=0.0)
    scored = scores(bench, model, folder / "adapter.gguf", N_SCORED)
    setup_s = ran.wall_s - read_state(folder / "run")["elapsed_s"]
    return ran.command, job, {**row_of(curve, small.peak_bytes, scored), "run_memory_bytes": ran.peak_bytes, "setup_s": setup_s}


def torch_row(bench: Bench, base: str, model: str, job: Job) -> Row:
    """AdamW on the dequantised base."""
    out = bench.fresh(f"paper-{base}-torch-{job.scope}") / "adapter.gguf"
    curve = in_child(adamw, job, "b", RATE, bench.seconds(SECONDS), floor=0.0, n_points=N_POINTS, out=out)
    steps, memory_bytes = peak_of(adamw, replace(job, questions=[], pool=job.pool[: 2 * BATCH]), "b", RATE, bench.seconds(10.0))
    if len(steps) < 2:
        raise BenchError("torch made no step in its time, so its memory is not known.")
    return row_of(curve, memory_bytes, scores(bench, model, out, N_SCORED))


def ggml_row(bench: Bench, base: str, model: str, job: Job) -> Row:
    """AdamW by llama.cpp itself, on the file as it is."""
    out = bench.fresh(f"paper-{base}-ggml") / "adapter.gguf"
    curve = in_child(ggml_curve, job, bench.seconds(SECONDS), out)
    _, memory_bytes = peak_of(ggml_curve, replace(job, questions=[], pool=job.pool[:BATCH]), 0.1, None)
    return row_of(curve, memory_bytes, scores(bench, model, out, N_SCORED))


def ggml_curve(job: Job, seconds: float, out: Path | None) -> Curve:
    """Losses of the questions at a few moments, and the adapter at the end; passes are of examples' length, not of windows."""
    from fwdllama.config import make_config
    from fwdllama.llama.model import Model
    from fwdllama.space import MODULES, build_space
    from gguf_tools.adapter import read_adapter, write_adapter

    from .backprop_ggml import trained, windows

    data = windows(job.pool, WINDOW)
    kept = trained(job.model, job.initial, data, RATE, job.n_threads, seconds=seconds, n_kept=N_POINTS // 2)
    if not job.questions:
        return [Point(at, float("nan"), step) for at, step, _ in kept]
    per_window = WINDOW * len(job.pool) / sum(e.n_tokens + 1 for e in job.pool)
    initial = read_adapter(job.initial)
    if out is not None:
        last = kept[-1][2]
        write_adapter(out, replace(initial, tensors={name: (a, last[f"{name}.lora_b"]) for name, (a, _) in initial.tensors.items()}))
    with Model(job.model) as model:
        layers = sorted({int(name.split(".")[1]) for name in initial.tensors})
        modules = [key for key, module in MODULES.items() if any(f".{module}." in name for name in initial.tensors)]
        shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b) in initial.tensors.items()}
        rank = next(iter(initial.ranks.values()))
        space = build_space(
            shapes, model.n_layers, modules=modules, layers=(layers[0], layers[-1]), rank=rank, alpha=initial.alpha, train="b", seed=0
        )
        space = replace(space, a={name: a for name, (a, _) in initial.tensors.items()})
        engine = make_config({"budget": {"steps": 1}}).engine
        curve = []
        with asking(model, space, "all", job.questions, engine, job.n_threads) as loss:
            for at, step, values in kept:
                theta = space.initial_theta()
                for name, view in space.views(theta):
                    view[:] = values[name]
                curve.append(Point(at, loss(theta), round(step * per_window)))
        return curve


def numbers_of(initial: Path) -> dict[str, int]:
    """How many numbers are trained (B), and how many the adapter has."""
    from gguf_tools.adapter import read_adapter

    adapter = read_adapter(initial)
    return {"trained": sum(b.size for _, b in adapter.tensors.values()), "all": adapter.n_parameters}


@functools.cache
def upload_bytes(bench: Bench) -> int | None:
    """What a device sends in a round, a task of 20 probes with headers and check-in; None without the aggregator."""
    from .measure import lacking

    if lacking(bench, "server"):
        return None
    from .federation.aggregator import Aggregator
    from .federation.load import uploads

    with Aggregator(bench.fresh("paper-upload")) as aggregator:
        return int(uploads(aggregator)["request"])


ITEMS = tuple(
    Item(
        f"paper-{base}",
        f"the paper's table, {base.upper()} base: memory, time and passes to loss {GOAL}, F1 and upload, forward-only and back-propagation",
        (Bar("memory_ratio", "<=", 1),),
        ("memory_ratio", "time_ratio", "forward_memory_bytes", "torch_memory_bytes", "forward_f1", "torch_f1"),
        ("data", base, "torch"),
        17,
        functools.partial(table, base),
    )
    for base in BASES
)
