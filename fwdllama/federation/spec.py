"""Everything that a federated run is, fixed when it is created; devices and aggregator read the same record.

The method's own choices are those of single-process training (`fwdllama.config`); what is added says how a round is shared out and how its
results are merged.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fwdllama.config import Positive, PositiveFloat, Section, TrainConfig

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(gt=0, le=1)]


class BaseModelReference(Section):
    """The model file that every device must have, told by its content."""

    sha256: Sha256
    name: Annotated[str, Field(max_length=200)]
    architecture: Annotated[str, Field(max_length=64)]


class RoundConfig(Section):
    """How the probes of a round are shared out."""

    probes: Annotated[int, Field(ge=1, le=1 << 17)] = 80  # of a round; with variance pacing the least
    most: Annotated[int, Field(ge=1, le=1 << 17)] = 320  # with variance pacing: never more
    probes_per_task: Annotated[int, Field(ge=1, le=4096)] = 20
    minimum: Share = 0.5  # of the wanted probes, with which a round may close once its deadline has passed
    over_selection: Annotated[float, Field(ge=1, le=4)] = 1.0  # leased at once, times what is wanted
    lease_s: PositiveFloat = 120.0  # after which a task is handed on
    deadline_s: PositiveFloat = 600.0
    extensions: Annotated[int, Field(ge=0)] = 1000  # of the deadline, after which the round is abandoned and the run paused
    staleness: Annotated[int, Field(ge=0, le=64)] = 0  # rounds by which a result may be late; 0: synchronous
    copies: Annotated[int, Field(ge=1, le=64)] = 1  # devices that are given the same seeds

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.most < self.probes:
            raise ValueError(f"most {self.most} cannot be below probes {self.probes}")
        return self


class AggregationConfig(Section):
    """How a round's results are merged."""

    rule: Literal["clip", "mean", "median", "trimmed"] = "clip"  # the last two are over the `copies` of a seed
    width: PositiveFloat = 3.0  # clip: median absolute deviations (normal-consistent) around the median
    scale: PositiveFloat = 2.0  # all but mean: a result's slopes are at most so many times those of the middle result
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.34  # trimmed: dropped at either end; one of three
    staleness_power: Annotated[float, Field(ge=0)] = 0.5  # a result s rounds late weighs (1 + s) ** -power
    max_loss: PositiveFloat = 50.0  # nats per token; a uniform guess among 262,144 tokens costs 12.5


class EvaluationConfig(Section):
    """Which versions are scored by their devices' held-out examples."""

    every: Positive = 4  # versions
    devices: Positive = 4  # that are asked
    patience: Positive | None = None  # scored versions without a better one, after which the run finishes


class RunSpec(Section):
    """A federated run. `train.budget.steps` counts rounds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    base: BaseModelReference
    train: TrainConfig
    eps: PositiveFloat
    initial: Sha256  # of the adapter file that every version starts from
    n_params: Annotated[int, Field(ge=1, le=1 << 30)]
    round: RoundConfig = RoundConfig()
    aggregation: AggregationConfig = AggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    public: bool = False  # whether versions are served without a key

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.aggregation.rule in ("median", "trimmed") and self.round.copies < 3:
            raise ValueError(f"rule {self.aggregation.rule!r} needs copies of at least 3, not {self.round.copies}")
        if self.aggregation.rule == "trimmed" and int(self.aggregation.trim * self.round.copies) < 1:
            least = 1 / self.round.copies
            raise ValueError(f"trim {self.aggregation.trim:g} of {self.round.copies} copies drops none; it must be at least {least:.3g}")
        if self.round.staleness and self.round.copies > 1:
            given = f"staleness {self.round.staleness} and copies {self.round.copies}"
            raise ValueError(f"{given} exclude each other: a slot that lacks copies cannot wait")
        if self.train.budget.seconds is not None:
            raise ValueError("budget.seconds has no meaning in a federated run; give steps (rounds) or probes")
        if self.train.budget.patience is not None:
            raise ValueError("budget.patience has no meaning in a federated run; give evaluation.patience")
        return self

    def genesis(self) -> bytes:
        """The hash that the run's ledger begins with."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).digest()
