"""Forward-only training against back-propagation: wall clock until the same loss on the same questions.

Both train the same numbers (B of the same matrices of the same base, from the same A, in the same scope) with as many threads
on examples of the same file. Forward-only is a run that was made before, replayed step by step from its ledger: a loss at step n
belongs to the time at which the run had finished step n, its own tests and held-out losses included. Back-propagation is AdamW in torch
on the dequantised base, and the best of several learning rates counts. On either side what is not training takes no time: loading,
and the questions' losses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fwdllama.types import Encoded, Scope

from .child import in_child
from .curve import Curve, Point, asking, fastest, reached_s
from .measure import Bar, Bench, Item, Measured
from .runs import SHORT, trained

LOSSES = (1.6, 1.45, 1.32, 1.2, 1.1, 1.0)  # nats per answer token; the third is the bar's
GOAL = 1.32
RATES = (1e-3, 3e-3, 1e-2)
SECONDS = 150.0  # for each rate
BATCH = 8  # examples of a step of AdamW
N_QUESTIONS, MAX_CONTEXT, SEED = 48, 700, 12  # contexts of fewer characters
N_POOL = 1500  # examples to train on: more than back-propagation gets through
SLICE = 16  # questions whose losses are computed at once, for memory

if TYPE_CHECKING:
    from fwdllama.config import TrainConfig

Train = Literal["b", "ab"]


@dataclass(frozen=True)
class Job:
    """What back-propagation gets: the run's model and first adapter, and examples in tokens."""

    model: Path
    initial: Path
    n_threads: int
    questions: list[Encoded]
    pool: list[Encoded]
    scope: Scope


def replayed_run(run: Path, dev: Path, n_questions: int, *, floor: float = min(LOSSES)) -> tuple[Curve, Job, Train]:
    """The questions' mean loss after every step of a run until `floor`, and the job for the other side."""
    from fwdllama.checkpoint import genesis_of, read_facts, read_metrics
    from fwdllama.config import read_config
    from fwdllama.encode import Encoder, model_template
    from fwdllama.layout import space_of
    from fwdllama.ledger import read_ledger, replay
    from fwdllama.llama.model import Model
    from fwdllama.machine import default_threads
    from fwdllama.tasks.load import load_dataset
    from gguf_tools.adapter import read_adapter
    from gguf_tools.model import read_model_info

    facts, config = read_facts(run), read_config(run / "config.json")
    path = Path(facts["files"]["model"])
    info = read_model_info(path)
    space = space_of(config, info)
    space = replace(space, a={name: a for name, (a, _) in read_adapter(run / "initial.gguf").tensors.items()})
    n_threads = config.engine.n_threads or default_threads()
    n_ctx = int(facts["identity"]["context"])
    with Model(path) as model:
        encoder = Encoder(model, model_template(model, config.template, "squad"))
        questions = drawn_questions(encoder, load_dataset(dev).examples, n_questions)
        pool = _pool(encoder, load_dataset(Path(facts["files"]["data"])).examples, n_ctx, config.seed)
        with asking(model, space, config.space.scope, questions, config.engine, n_threads) as loss:
            theta = space.initial_theta()
            curve = [Point(0.0, loss(theta))]
            for entry, row in zip(read_ledger(run / "ledger.bin", genesis_of(facts)), read_metrics(run), strict=True):
                theta = replay(theta, [entry])
                passes = curve[-1].passes + passes_of(config, row)
                curve.append(Point(row["elapsed_s"], loss(theta), passes))
                if curve[-1].loss <= floor:
                    break
    return curve, Job(path, run / "initial.gguf", n_threads, questions, pool, config.space.scope), config.space.train


def passes_of(config: TrainConfig, row: Mapping[str, Any]) -> int:
    """Losses of single examples that the step of a row of metrics asks for: of its probes, of its batch at theta, and of its test on fresh
    examples; in the warm-up of the trials that were given up, since the one that was not is the next step's batch at theta.
    """
    from fwdllama.trainer import WARMUP_FACTORS

    batch, estimator = config.batch, config.estimator
    n_batch = batch.units * batch.per_unit
    probed = row["n_probes"] * estimator.examples_per_probe
    if config.pacing.kind == "fixed":  # some groups are smaller than they may be, but each round has every example once
        probed = min(probed, (estimator.rounds + config.first_rounds) * n_batch)
    sides = 1 if estimator.sided == "one" else 2
    if row["step"] < len(config.warmup):
        factor = row["step_factor"]
        tried = n_batch * (WARMUP_FACTORS.index(factor) if factor else len(WARMUP_FACTORS))
    else:
        tried = 2 * batch.fresh * batch.per_unit if config.step.accept else 0
    return sides * probed + n_batch + tried


def drawn_questions(encoder: Any, examples: Sequence[Any], n: int) -> list[Encoded]:
    """The first n, in an order drawn from SEED, of the questions about short contexts."""
    from fwdllama.batches import shuffled

    short = [e for e in examples if len(e.fields["context"]) < MAX_CONTEXT]
    return [encoder.example(short[i]) for i in shuffled(SEED, 0, len(short))[:n]]


def _pool(encoder: Any, examples: Sequence[Any], n_ctx: int, seed: int) -> list[Encoded]:
    """Examples that the run could have seen too, in random order."""
    from fwdllama.batches import shuffled

    found = []
    for i in shuffled(seed, 0, len(examples)):
        example = encoder.example(examples[i])
        if example.n_tokens <= n_ctx:
            found.append(example)
        if len(found) == N_POOL:
            break
    return found


class _Reached(Exception):
    """Nothing more to find out."""


def adamw(
    job: Job,
    train: Train,
    rate: float,
    seconds: float,
    *,
    floor: float = min(LOSSES),
    n_points: int | None = None,
    out: Path | None = None,
) -> Curve:
    """The questions' mean loss over AdamW until `floor` or `seconds` of training: after every step, or at about `n_points` moments.

    What was learned goes to `out`, an adapter file. Without questions nothing is measured but time.
    """
    import torch

    from gguf_tools.adapter import read_adapter, write_adapter

    from .backprop import Example, Lora, TorchLlama, example_losses, prefill_batch, train_adamw

    torch.set_num_threads(job.n_threads)
    model = TorchLlama.from_gguf(job.model)
    adapter = read_adapter(job.initial)
    ranks = set(adapter.ranks.values())
    scale = adapter.alpha / ranks.pop()
    tensors = {name: (torch.tensor(a), torch.zeros(b.shape)) for name, (a, b) in adapter.tensors.items()}
    lora = Lora(tensors, scale, train=train)

    def example(e: Encoded) -> Example:
        prompt, tokens = list(e.prompt), [*e.invocation, *e.target]
        return Example(prompt, tokens, len(e.invocation)) if job.scope == "answer" else Example([], prompt + tokens, len(prompt) + len(e.invocation))

    questions = [example(e) for e in job.questions]
    slices = [questions[i : i + SLICE] for i in range(0, len(questions), SLICE)]
    caches = [prefill_batch(model, [e.prompt for e in part]) if part[0].prompt else [None] * len(part) for part in slices]

    def loss() -> float:
        with torch.no_grad():
            found = [example_losses(model, lora, cache, part) for cache, part in zip(caches, slices, strict=True)]
        return float(torch.cat(found).double().mean()) if found else float("nan")

    curve = [Point(0.0, loss())]

    def on_step(step: int, elapsed_s: float, batch_loss: float) -> None:
        if n_points is None or elapsed_s >= min(seconds, len(curve) * seconds / n_points):
            curve.append(Point(elapsed_s, loss(), step * BATCH))
        if curve[-1].loss <= floor:
            raise _Reached

    with contextlib.suppress(_Reached):
        train_adamw(model, lora, [example(e) for e in job.pool], rate, BATCH, seconds, on_step)
    if out is not None:
        write_adapter(out, replace(adapter, tensors={name: (a.detach().numpy(), b.detach().numpy()) for name, (a, b) in lora.weights.items()}))
    return curve


def figures_of(forward: Curve, same: Mapping[float, Curve], more: Mapping[float, Curve]) -> dict[str, Any]:
    """The race's figures, from curves by learning rate: of the same trained numbers, and of A and B together."""
    found: dict[str, Any] = {"forward_s": {}, "backprop_s": {}, "backprop_ab_s": {}, "ratios": {}}
    for loss in LOSSES:
        found["forward_s"][str(loss)] = mine = reached_s(forward, loss)
        found["backprop_s"][str(loss)] = other = fastest(list(same.values()), loss)
        found["backprop_ab_s"][str(loss)] = fastest(list(more.values()), loss)
        found["ratios"][str(loss)] = mine / other if mine and other else None
    goal = str(GOAL)
    ours, with_a = found["forward_s"][goal], found["backprop_ab_s"][goal]
    by_rate = {rate: seconds for rate, curve in same.items() if (seconds := reached_s(curve, GOAL)) is not None}
    return {
        "ratio": found["ratios"][goal],
        "forward_goal_s": ours,
        "backprop_goal_s": found["backprop_s"][goal],
        "backprop_ab_goal_s": with_a,
        "ratio_ab": ours / with_a if ours and with_a else None,
        "best_rate": min(by_rate, key=lambda rate: by_rate[rate], default=None),
        "forward_best_loss": min(point.loss for point in forward),
        "untrained_loss_llama": forward[0].loss,  # the same model on the same questions: how well the two engines agree
        "untrained_loss_torch": next(iter(same.values()))[0].loss,
        **found,
        "forward_curve": forward,
        "backprop_curves": {str(rate): curve for rate, curve in same.items()},
        "backprop_ab_curves": {str(rate): curve for rate, curve in more.items()},
    }


def race(bench: Bench) -> Measured:
    """Replay the run of 300 s, then train by back-propagation with every rate, B alone and A and B."""
    made = trained(bench, SHORT)
    forward, job, train = in_child(replayed_run, made.run, bench.dev_data, N_QUESTIONS)

    def curves(kind: Train) -> dict[float, Curve]:
        return {rate: in_child(adamw, job, kind, rate, bench.seconds(SECONDS)) for rate in RATES}

    same = curves(train)
    figures = figures_of(forward, same, same if train == "ab" else curves("ab"))
    more = {"threads": job.n_threads, "questions": len(job.questions), "backprop_batch": BATCH, "run_commit": made.commit}
    return Measured({**figures, **more}, "fwdllama bench backprop-race")


ITEMS = (
    Item(
        "backprop-race",
        f"time to loss {GOAL} on {N_QUESTIONS} unseen questions: forward-only over back-propagation (AdamW at its best rate)",
        (Bar("ratio", "<=", 1.5),),
        ("ratio", "forward_goal_s", "backprop_goal_s", "best_rate", "backprop_ab_goal_s", "forward_best_loss"),
        ("data", "torch"),
        30,
        race,
    ),
)
