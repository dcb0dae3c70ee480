"""Every choice of a training run, with its default and the reason for it; frozen, checked, and stored in the run directory.

Defaults were chosen by measurement on SmolLM2-135M with SQuAD training questions (LOG.md has the trials).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fwdllama.errors import UsageError
from fwdllama.space import MODULES

FIRST_ROUNDS = 10  # unless said otherwise
WARMUP_ROUNDS = (1, 1, 2, 2, 4, 4)  # of the first steps
LR, HALF_LIFE, USUAL_PROBES = 0.0075, 10_000, 25_000  # unless said otherwise; chosen together, in runs of 300 s on two cores, of so many probes
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SpaceConfig(Section):
    """What is trained."""

    modules: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up")
    layers: tuple[int, int] | None = None  # first and last; None: see `layer_band`
    rank: Positive = 4
    alpha: PositiveFloat = 8.0
    train: Literal["b", "ab"] = "b"
    init: Literal["activation", "random"] = "activation"  # how A is chosen
    scope: Literal["answer", "all"] = "answer"

    @field_validator("modules")
    @classmethod
    def _known(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        for module in modules:
            if module not in MODULES:
                hint = "; with tied embeddings it is the output matrix too" if module == "token_embd" else ""
                raise ValueError(f"module {module!r} cannot be trained{hint}; choose from {', '.join(MODULES)}")
        if not modules or len(set(modules)) != len(modules):
            raise ValueError(f"modules {','.join(modules)!r} must name at least one module, each once")
        return modules


class EstimatorConfig(Section):
    """How slopes are measured."""

    examples_per_probe: Positive = 1  # probes share decodes, so that one example costs a fourth of four; and only alone can it be clipped
    sided: Literal["one", "two"] = "one"
    rounds: Positive = 8  # directions for each group of examples and step
    first_rounds: Annotated[int, Field(ge=0)] | None = None  # the same, of the answers' first tokens alone; None: see `TrainConfig.first_rounds`
    eps: PositiveFloat | None = None  # None: calibrated
    outlier: PositiveFloat = 1.5  # times the batch's mean loss, from where on an example counts ever less
    example_clip: PositiveFloat = 2.0  # times the median example's root mean square slope, from where on an example's slopes are scaled down
    objective: Literal["nll", "f1"] = "nll"
    vocabulary: Literal["data", "whole"] = "data"  # tokens that a loss weighs an answer's against, where lower layers are computed apart


class PacingConfig(Section):
    """When a step is taken."""

    kind: Literal["fixed", "variance"] = "fixed"
    tau: PositiveFloat = 0.02  # variance gate, nats^2 per eps^2
    max_rounds: Positive = 32


class StepConfig(Section):
    """What a step does with its slopes."""

    # lr: of the step that would be best for one probe alone; the others of the step add to it, and most noise stays. half_life: probes after which
    # it is half, and after twice as many a third, since slopes shrink as answers become right. None: LR and HALF_LIFE, see `step.rate_of`.
    lr: PositiveFloat | None = None
    half_life: Positive | None = None
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.05  # fraction left at the end of the budget
    accept: bool = False  # test each step on fresh examples, as the first is without warm-up; halve or reject it where it is clearly worse
    warmup: bool = True  # begin with steps of few probes, each long for it: twice as fast to what an untrained model learns first
    candidates: Positive = 1  # 1: uniform sampling of seeds; more: the best aligned of so many


class BatchConfig(Section):
    """Which examples are in memory."""

    units: Positive = 8  # paragraphs (or single examples of ungrouped data) held at once
    per_unit: Positive = 5  # questions of each
    fresh: Positive = 3  # units replaced before each step
    n_ctx: Positive | None = None  # tokens of an example; None: from the data
    held_out: Positive = 32  # examples of the evaluation data whose loss is watched
    evaluate_every: Positive = 4  # steps


class BudgetConfig(Section):
    """When training ends; whichever comes first."""

    seconds: PositiveFloat | None = None
    steps: Positive | None = None
    probes: Positive | None = None
    patience: Positive | None = None  # evaluations without a better held-out loss

    def fraction(self, n_steps: int, n_probes: int, elapsed_s: float = 0.0) -> float:
        """How much of the tightest budget is used, 0 to 1; federated runs, whose steps are rounds, have none in seconds."""
        spent = ((elapsed_s, self.seconds), (n_steps, self.steps), (n_probes, self.probes))
        return min(1.0, max((used / limit for used, limit in spent if limit is not None), default=0.0))

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.seconds is None and self.steps is None and self.probes is None:
            raise ValueError("one of seconds, steps and probes must be given")
        return self


class EngineConfig(Section):
    """How llama.cpp runs; nothing here changes what is learned, though kernels differ in their last bits."""

    n_threads: Positive | None = None  # None: one a core
    kv_type: Literal["f16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f16"
    mmap: bool = False
    repack: bool = True
    flash: bool = False  # flash attention makes a loss depend on what else is decoded with it, by up to 0.07 nats
    n_gpu_layers: Annotated[int, Field(ge=0)] = 0
    n_batch: Positive = 512
    together: Positive = 16  # examples of one decode of probes, each probe with a theta of its own; 1: one probe after the other
    trunk: bool = True  # compute the layers below the first trained one once an example
    stage_layers: Positive | None = None  # so many of those layers are in memory at a time, before training; None: all, beside the trained ones
    states: Literal["f32", "f16"] | None = None  # what enters the first trained layer; None: f16 where it is kept on disk
    keep_prompts_bytes: Positive | None = 2 << 30  # of disk, for prompts of data that are seen again, shared by all runs; None: none


class TrainConfig(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=1 << 53)] = 0  # exact in JSON, whoever reads it
    template: Literal["seed", "chat"] = "seed"
    space: SpaceConfig = SpaceConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    pacing: PacingConfig = PacingConfig()
    step: StepConfig = StepConfig()
    batch: BatchConfig = BatchConfig()
    budget: BudgetConfig
    engine: EngineConfig = EngineConfig()

    @property
    def fewest_rounds(self) -> int:
        """Directions for each group of examples that a step has at least."""
        return self.estimator.rounds if self.pacing.kind == "fixed" else min(4, self.pacing.max_rounds)

    @property
    def first_rounds(self) -> int:
        """Directions for each group of examples and step by which only the first token of each answer is judged.

        That token says whether a model looks in the right place. Its loss alone costs a fourth of a whole answer's, and its slopes are not drowned in
        those of when to stop (LOG.md). In scope `all`, where the prompt is most of the work, and for objective f1 there are none unless asked for.
        """
        if self.estimator.first_rounds is not None:
            return self.estimator.first_rounds
        return FIRST_ROUNDS if self.space.scope == "answer" and self.estimator.objective == "nll" else 0

    @property
    def warmup(self) -> tuple[int, ...]:
        """Rounds of the first steps, as far as they are fewer than the usual ones; those steps share the first batch.

        At first all examples want the same, and a few probes know it well; many of them add up to a step in that one direction that is far too
        long for its curvature, unless each is short (LOG.md).
        """
        if not self.step.warmup or self.pacing.kind != "fixed":
            return ()
        return tuple(rounds for rounds in WARMUP_ROUNDS if rounds < self.estimator.rounds)

    def batch_of(self, step: int) -> int:
        """The number of the batch of a step."""
        return max(0, step - len(self.warmup))

    def last_batch(self, n_slots: int) -> int | None:
        """The number of the last batch that the budget has room for, None where it is limited by time alone; every step but the first has
        `fewest_rounds` probes of each group of its examples, of which there are `n_slots` at least.

        >>> budgets = {"probes": 100}, {"steps": 19, "probes": 1000}, {"steps": 9}, {"seconds": 9}
        >>> [TrainConfig(budget=BudgetConfig(**budget)).last_batch(8) for budget in budgets]
        [1, 7, 3, None]
        """
        n_probes = (self.fewest_rounds + self.first_rounds) * -(-n_slots // self.estimator.examples_per_probe)
        limits = [] if self.budget.steps is None else [self.batch_of(self.budget.steps)]
        if self.budget.probes is not None:
            limits.append(-(-self.budget.probes // n_probes))
        return min(limits, default=None)

    @property
    def half(self) -> bool:
        """Whether what enters the first trained layer is rounded to half precision."""
        return (self.engine.states or ("f32" if self.engine.stage_layers is None else "f16")) == "f16"

    @property
    def n_places(self) -> int:
        """Probes that are evaluated in one decode, of which each takes other examples of the batch."""
        per_probe = self.estimator.examples_per_probe
        return max(1, min(self.engine.together, self.batch.units * self.batch.per_unit) // per_probe)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.estimator.first_rounds and self.estimator.objective == "f1":
            raise ValueError(f"first_rounds {self.estimator.first_rounds} needs objective nll: an answer's first token has no F1")
        if self.engine.stage_layers is not None and not (self.engine.trunk and self.estimator.objective == "nll"):
            raise ValueError("stage_layers needs the trunk and objective nll: only then are lower layers computed before training")
        if self.estimator.examples_per_probe > self.batch.units * self.batch.per_unit:
            most = self.batch.units * self.batch.per_unit
            raise ValueError(f"examples_per_probe {self.estimator.examples_per_probe} exceeds the {most} examples of a batch (units x per_unit)")
        if self.batch.fresh > self.batch.units:
            raise ValueError(f"fresh {self.batch.fresh} cannot exceed units {self.batch.units}")
        return self


def make_config(values: dict[str, Any]) -> TrainConfig:
    """A checked configuration from nested plain values.

    Raises:
        UsageError: a value is out of range, of the wrong type, or unknown; the first problem, in one sentence.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "configuration"
        given = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UsageError(f"{place}: {first['msg'].removeprefix('Value error, ')}{given}.") from error


def read_config(path: Path) -> TrainConfig:
    """The configuration stored in a run directory."""
    import json

    try:
        return make_config(json.loads(path.read_text()))
    except (OSError, ValueError) as error:  # not UTF-8, not JSON
        raise UsageError(f"{path}: not a readable configuration ({error}).") from error


def layer_band(n_layers: int) -> tuple[int, int]:
    """First and last of the layers that are trained unless told otherwise: from a third of the depth to a little over half.

    There a unit of curvature buys the most slope once an answer's form is learned (LOG.md).

    >>> layer_band(30)
    (10, 16)
    """
    first = n_layers // 3
    return first, max(first, round(0.57 * n_layers) - 1)
