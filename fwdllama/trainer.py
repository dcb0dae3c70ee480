"""The training loop: batch, probes, step, test, record. It knows the oracle only through its protocol.

One step in nine sentences: the batch's rolling part is replaced; the unperturbed losses are taken once; groups of examples are drawn;
every probe writes theta + eps z and asks one group's loss; more probes ask for that of the answers' first tokens alone; slopes are
centred and clipped, those of each group and all; coefficients follow from their size alone; the next batch is loaded, and a first step
without warm-up, others on request, tested on what is new in it; what is kept goes into the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fwdllama.batches import RollingBatches, grouped
from fwdllama.checkpoint import RunDirectory, State
from fwdllama.config import TrainConfig
from fwdllama.errors import EngineError
from fwdllama.estimator import Probe, centred_slopes, evaluate
from fwdllama.ledger import Entry
from fwdllama.oracle import Losses, LossOracle
from fwdllama.pacing import Fixed, Pacing, VarianceGate
from fwdllama.progress import Clock, Progress
from fwdllama.sampler import Sampler
from fwdllama.step import Measured, combined, rate_of, warmup_factor
from fwdllama.types import Encoded

FIRST_STEP_FACTORS = (0.5, 1.0, 2.0, 4.0)  # powers of two, so that scaled coefficients stay exact
WARMUP_FACTORS = (1.0, 0.5, 0.25)
# Standard errors. A test on eight examples, two paragraphs, is heavy-tailed: at two, one step in six was rejected, and runs ended 0.2 nats worse.
CLEARLY_WORSE = 4.0


@dataclass
class Trainer:
    """A run in progress. `run()` goes on until a budget ends it or `stop` becomes true; every step is on disk when it is shown."""

    config: TrainConfig
    oracle: LossOracle
    batches: RollingBatches
    held_out: Sequence[Encoded | None]  # rows that stay loaded in front of every batch; may be empty
    directory: RunDirectory
    theta: NDArray[np.float32]
    clock: Clock = field(default_factory=Clock)
    on_progress: Callable[[Progress], None] = lambda progress: None
    stop: Callable[[], bool] = lambda: False
    rest: Callable[[], None] = lambda: None  # called between probes; may wait, which is no time of training
    _update: NDArray[np.float32] | None = None
    _ahead: Losses | None = None  # at theta, by row of the batch, where the step before found them out
    _rested_s: float = 0.0

    def run(self) -> State:
        """Train until a budget is used up, the held-out loss no longer falls, or `stop` says so; returns the last state."""
        self._begun = self._now() - self.directory.state.elapsed_s
        self._decode_before = self.directory.state.decode_s - self.clock.decode_s()
        self._update = self.directory.last_update(self.theta.size)  # the aligned sampler's seeds follow from it
        self._load(self.state.step)
        if self.state.step == 0 and self.state.best_loss is None and self.held_out:
            self.oracle.write(self.theta)
            self.directory.save(replace(self.state, best_loss=self._held_out_loss()))
        while self.state.finished is None:
            reason = self._spent()
            if reason is not None:
                self._finish(reason)
                break
            self._rest()
            if self.stop() or not self._step():
                break
        return self.state

    @property
    def state(self) -> State:
        """The state as recorded."""
        return self.directory.state

    def _rest(self) -> None:
        began = self.clock.now()
        self.rest()
        self._rested_s += self.clock.now() - began

    def _now(self) -> float:
        """A clock that stands still during rests: a budget of seconds is one of work, on a phone that must cool as on any other."""
        return self.clock.now() - self._rested_s

    def _elapsed(self) -> float:
        return self._now() - self._begun

    def fraction(self, at: State | None = None) -> float:
        """How much of the tightest budget is used, 0 to 1: now, or when the state is `at`."""
        state = at or self.state
        return self.config.budget.fraction(state.step, state.n_probes, self._elapsed())

    def _spent(self) -> str | None:
        patience = self.config.budget.patience
        if patience is not None and self.state.evaluations_since_best >= patience:
            return f"the held-out loss has not fallen for {patience} evaluations"
        return "the budget is used up" if self.fraction() >= 1.0 else None

    def _finish(self, reason: str) -> None:
        self.directory.save(replace(self.state, finished=reason, elapsed_s=self._elapsed()))

    def _load(self, step: int) -> list[int]:
        """Put the batch of `step` behind the held-out rows; returns the rows that are new in it."""
        rows, new = self.batches.batch(self.config.batch_of(step))
        self._rows = [*self.held_out, *rows]
        self.oracle.load(self._rows)
        return [len(self.held_out) + row for row in new]

    def _held_out_loss(self) -> float:
        rows = [i for i, example in enumerate(self.held_out) if example is not None]
        loss = float(self.oracle.losses(rows).mean())
        if not np.isfinite(loss):
            raise EngineError(f"step {self.state.step}: the held-out loss is not a number; lower --lr or check the model.")
        return loss

    @property
    def _rounds(self) -> int:
        """Directions for each group of examples in this step, where their number is fixed."""
        warmup = self.config.warmup
        return warmup[self.state.step] if self.state.step < len(warmup) else self.config.estimator.rounds

    def _pacing(self, n_groups: int) -> Pacing:
        pacing = self.config.pacing
        if pacing.kind == "fixed":
            return Fixed(self._rounds * n_groups)
        return VarianceGate(pacing.tau, self.config.fewest_rounds * n_groups, pacing.max_rounds * n_groups)

    def _step(self) -> bool:
        """One step; False when it was interrupted before anything of it was recorded."""
        config, state = self.config, self.state
        started, tokens = self._now(), self.clock.n_tokens()
        decoded = self.clock.decode_s()
        fraction = self.fraction()
        offset = len(self.held_out)
        own = [None] * offset + list(self._rows[offset:])
        groups = grouped(own, config.estimator.examples_per_probe, state.step)
        members = sorted(row for group in groups for row in group)
        losses = self._losses(members) if self._ahead is None else self._ahead
        self._ahead = None
        if not np.isfinite(losses[members]).all():
            raise EngineError(f"step {state.step}: the model's loss is not a number; lower --lr or check the model.")
        share = self._rounds / config.estimator.rounds  # below 1 in the warm-up
        n_first = math.ceil(config.first_rounds * share) * len(groups)
        whole = self._measured(groups, losses, self._pacing(len(groups)), fraction, more=n_first)
        first = self._measured(groups, self._losses(members, n_targets=1), Fixed(n_first), fraction, before=whole) if whole and n_first else None
        if whole is None or (n_first and first is None):
            return False
        lr = state.lr_scale * rate_of(config.step, fraction=fraction, n_probes=state.n_probes)
        if share < 1:
            lr *= warmup_factor(share)
        parts = [whole, first] if first else [whole]
        values = np.concatenate([part.coefficients(lr, config.estimator.examples_per_probe) for part in parts])
        probes = [probe for part in parts for probe in part.probes]
        update = combined([probe.bits for probe in probes], values, self.theta.size)
        factor = self._tried(update, members, losses) if share < 1 else self._tested(update)
        values *= np.float32(factor)
        update *= np.float32(factor)
        self.theta = self.theta - update
        self._update = update
        entry = Entry(state.step, np.array([p.seed for p in probes], np.uint64), values)
        after = replace(
            state,
            step=state.step + 1,
            n_probes=state.n_probes + len(probes),
            mean_square=whole.mean_square,
            first_mean_square=first.mean_square if first else state.first_mean_square,
            lr_scale=_next_scale(state.lr_scale, factor, first=state.step == len(config.warmup) == 0),
        )
        held_out = None
        last = self.fraction(after) >= 1.0
        if self.held_out and (after.step % config.batch.evaluate_every == 0 or last):
            self.oracle.write(self.theta)
            held_out = self._held_out_loss()
            after = _judged(after, held_out)
        spent = self._now() - started
        after = replace(after, elapsed_s=self._elapsed(), decode_s=self._decode_before + self.clock.decode_s())
        metrics = {
            "step": state.step,
            "elapsed_s": round(after.elapsed_s, 3),
            "n_probes": len(probes),
            "n_probes_gate": whole.wanted,
            "n_probes_first": len(first.probes) if first else 0,
            "loss": float(losses[members].mean()),
            "held_out_loss": held_out,
            "projected_gradient_rms": float(np.sqrt(np.mean(np.square(whole.usable)))) if len(whole.usable) else 0.0,
            "accepted": factor > 0,
            "step_factor": factor,
            "lr": lr,
            "eps": state.eps,
            "tokens_per_s": (self.clock.n_tokens() - tokens) / spent if spent > 0 else 0.0,
            "decode_fraction": (self.clock.decode_s() - decoded) / spent if spent > 0 else 0.0,
            "peak_memory_bytes": self.clock.peak_memory_bytes(),
        }
        self.directory.record(entry, self.theta, after, metrics, snapshot=after.step % 8 == 0)
        self.on_progress(Progress(self.state, metrics, len(probes), len(probes), self.fraction()))
        return True

    def _losses(self, rows: Sequence[int], theta: NDArray[np.float32] | None = None, *, n_targets: int | None = None) -> Losses:
        """Losses of whole answers, or of their first `n_targets` tokens, at `theta`, None: where training is; by row of the batch, NaN where a row
        is none of `rows`.
        """
        losses = np.full(len(self._rows), np.nan)
        self.oracle.write(self.theta if theta is None else theta)
        losses[rows] = self.oracle.losses(rows, n_targets=n_targets)
        return losses

    def _measured(
        self, groups: Sequence[Sequence[int]], losses: Losses, pacing: Pacing, fraction: float, *, before: Measured | None = None, more: int = 0
    ) -> Measured | None:
        """Probes until the pacing is content; None when asked to stop, because half a step would not repeat.

        losses: at theta, by row; `before` are the step's probes of whole answers, behind which those of first tokens come; `more` are still to come.
        """
        config, state = self.config, self.state
        sampler, estimator = Sampler(config.seed, config.step.candidates), config.estimator
        base = losses if estimator.sided == "one" else None
        limit = estimator.outlier * float(np.nanmean(losses))
        n_targets, done = (1, len(before.probes)) if before else (None, 0)
        probes: list[Probe] = []
        slopes = np.zeros(0)
        wanted = pacing.wanted(slopes)
        while len(probes) < wanted:
            n = min(len(groups), wanted - len(probes))
            plan = [
                (sampler.seed(state.step, done + len(probes) + i, self._update), (len(probes) + i) % len(groups)) for i in range(n)
            ]
            for probe in evaluate(self.oracle, self.theta, plan, groups, base, state.eps, limit, n_targets):
                probes.append(probe)
                self._rest()
                if self.stop():
                    return None
                self.on_progress(Progress(state, None, done + len(probes), done + wanted + more, fraction))
            slopes = centred_slopes(probes, state.eps, estimator.sided)
            wanted = pacing.wanted(slopes)
        mean_square = state.first_mean_square if before else state.mean_square
        return Measured.of(probes, slopes, wanted, mean_square, estimator.example_clip)

    def _tried(self, update: NDArray[np.float32], rows: Sequence[int], losses: Losses) -> float:
        """The factor to take a step of the warm-up with: the first of WARMUP_FACTORS that lowers the batch's own losses, which the next step needs.

        How far such a step may go depends on how much the examples agree, and nothing is known of that before the first.
        """
        self._load(self.state.step + 1)
        for factor in WARMUP_FACTORS:
            ahead = self._losses(rows, self.theta - np.float32(factor) * update)
            if ahead[rows].mean() < losses[rows].mean():
                self._ahead = ahead
                return factor
        return 0.0

    def _tested(self, update: NDArray[np.float32]) -> float:
        """Load the next batch and try the step on the examples that are new in it: the factor to take it with.

        A later step is kept unless the new examples say clearly that it is worse; then it is halved if
        that is better than nothing, else rejected. The first step, whose curvature is that of an untrained model, takes the best of several.
        """
        new = self._load(self.state.step + 1)
        if not new or not (self.config.step.accept or self.state.step == 0):
            return 1.0
        self.oracle.write(self.theta)
        before = self.oracle.losses(new)

        def change(factor: float) -> NDArray[np.float64]:
            self.oracle.write(self.theta - np.float32(factor) * update)
            return self.oracle.losses(new) - before

        if self.state.step == 0:
            means = {factor: float(np.nan_to_num(change(factor), nan=np.inf).mean()) for factor in FIRST_STEP_FACTORS}
            best = min(means, key=lambda factor: means[factor])
            return best if means[best] < 0 else 0.0
        worse = change(1.0)
        error = float(worse.std()) / np.sqrt(len(new))
        if np.isfinite(worse).all() and worse.mean() <= CLEARLY_WORSE * error:
            return 1.0
        return 0.5 if change(0.5).mean() < 0 else 0.0


def _next_scale(scale: float, factor: float, *, first: bool) -> float:
    """Learning-rate factor after a step: halved where the step was too long, and slowly back towards 1."""
    if first:
        return scale
    return scale * 0.5 if factor < 1 else min(1.0, scale * 1.25)


def _judged(state: State, held_out_loss: float) -> State:
    if state.best_loss is None or held_out_loss < state.best_loss:
        return replace(state, best_loss=held_out_loss, best_step=state.step, evaluations_since_best=0)
    return replace(state, evaluations_since_best=state.evaluations_since_best + 1)
