"""Peak memory of evaluating and of training: which weights, contexts and arrays are alive at once, phase by phase.

The one estimate of the project. `train` and `eval` refuse with it what will not fit before they load anything, `gguf plan` shows it. What
llama.cpp holds comes from `gguf_tools.plan`; here is what surrounds it, and which of it exists together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fwdllama.config import TrainConfig
from fwdllama.layout import space_of
from fwdllama.llama.activation import MAX_TOKENS
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import ModelOptions
from fwdllama.loss import VALUES_AT_ONCE
from fwdllama.space import Space
from gguf_tools.graph import EXACT_KV_TYPES
from gguf_tools.model import ModelInfo
from gguf_tools.plan import Item, Part, Sizes, context_items, model_items
from gguf_tools.split import can_be_cut

EXAMPLES_BYTES = 12 << 20  # of 4,000 SQuAD questions as Python holds them, with the tokens of those that were drawn
SPACE_COPIES = 5  # of A and B: llama.cpp's, the adapter's, the chosen A, the initial adapter, its file while it is loaded
THETA_COPIES = 8  # theta, the last update, a probe's offset and position, a step's sum and the direction being added, and a test of it
MIN_OUTPUTS = 64  # logits rows a decode; 64 of a vocabulary of 50,000 are 13 MB

CUTTING = "cutting the model in two"


@dataclass(frozen=True)
class Phase:
    """A stretch of a run, and what it holds."""

    name: str
    items: tuple[Item, ...]

    @property
    def total_bytes(self) -> int:
        """Sum of the items."""
        return sum(item.size_bytes for item in self.items)

    @property
    def mapped_bytes(self) -> int:
        """What of it the system can take back."""
        return sum(item.size_bytes for item in self.items if item.mapped)


@dataclass(frozen=True)
class Plan:
    """The phases of a command; its peak is that of the largest."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    def within(self, base: Item) -> Plan:
        """The same with something that is there all the time."""
        return Plan(tuple(replace(phase, items=(base, *phase.items)) for phase in self.phases))


@dataclass(frozen=True)
class Shape:
    """What a training run's data decide: tokens and number of sequences, the size of a unit, logits rows."""

    n_ctx: int
    n_seq: int
    unit_size: int
    n_outputs: int = MIN_OUTPUTS

    @classmethod
    def expected(cls, config: TrainConfig, n_ctx: int) -> Shape:
        """As data with enough questions on each paragraph will have it; what is held out is whole paragraphs."""
        batch = config.batch
        held_out = -(-batch.held_out // batch.per_unit) * batch.per_unit
        n_seq = held_out + batch.units * batch.per_unit
        return cls(n_ctx, n_seq, batch.per_unit, max(MIN_OUTPUTS, n_seq))


def engine_options(*, batch: int, n_ctx: int, n_threads: int, kv_type: str = "f16") -> ContextOptions:
    """The context in which questions are answered, `batch` at a time."""
    return ContextOptions(
        n_ctx_seq=n_ctx,
        n_seq=batch,
        n_outputs=max(batch, MIN_OUTPUTS),
        n_batch=max(batch, 512),
        n_threads=n_threads,
        kv_type=kv_type,
        # Flash attention depends on what else is in the decode: the loss of one example of SmolLM2 Q8_0 moved by up to
        # 0.07 nats between batches of 1 and 8, and by nothing without it, at the same speed. Quantised V needs it.
        flash=kv_type not in EXACT_KV_TYPES,
    )


def context_of(options: ContextOptions, part: Part, label: str, *, lora_rank: int = 0) -> list[Item]:
    """A context's items."""
    sizes = Sizes(options.n_ctx_seq, options.n_seq, options.n_outputs, options.n_batch, options.kv_type, options.flash)
    return context_items(part, sizes, label, lora_rank=lora_rank)


def evaluation(info: ModelInfo, options: ContextOptions, weights: ModelOptions, *, lora_rank: int = 0) -> Plan:
    """Answering questions and computing losses; `lora_rank` 0 without an adapter."""
    whole = Part.whole(info)
    items = [
        *model_items(whole, "the model", mmap=weights.mmap, repack=weights.repack),
        *context_of(options, whole, "the model", lora_rank=lora_rank),
        _losses(info),
        Item("examples and their tokens", EXAMPLES_BYTES),
    ]
    return Plan((Phase("answering", tuple(items)),))


def _losses(info: ModelInfo) -> Item:
    """`fwdllama.loss.token_nll`: exponentials of some logits."""
    return Item("losses from logits", 4 * max(info.n_vocab, VALUES_AT_ONCE))


def training_options(config: TrainConfig, shape: Shape, n_threads: int) -> ContextOptions:
    """The context in which probes are evaluated."""
    engine = config.engine
    return ContextOptions(
        n_ctx_seq=shape.n_ctx,
        n_seq=shape.n_seq,
        n_outputs=max(shape.n_outputs, shape.n_seq),
        n_batch=max(engine.n_batch, shape.n_seq),
        n_threads=n_threads,
        kv_type=engine.kv_type,
        flash=engine.flash or engine.kv_type not in EXACT_KV_TYPES,  # llama.cpp reads a quantised V only with it
    )


def training(info: ModelInfo, config: TrainConfig, shape: Shape) -> Plan:
    """A whole run, on a machine that has neither the model's parts nor its A matrices from an earlier one."""
    space = space_of(config, info)
    engine, first = config.engine, space.first_layer
    options = training_options(config, shape, 1)
    cut = engine.trunk and config.estimator.objective == "nll" and first > 0 and can_be_cut(info, first)
    top = Part(info, first if cut else 0, info.n_layers)
    label = f"layers {top.first} to {top.last - 1}" if cut else "the model"
    held = [Item("examples and their tokens", EXAMPLES_BYTES), *model_items(top, label, mmap=engine.mmap, repack=engine.repack)]
    if cut:
        trunk = Part(info, 0, first + 1)
        below = f"layers 0 to {first}"
        held += model_items(trunk, below, mmap=engine.mmap, repack=engine.repack)
        held += context_of(replace(options, n_seq=shape.unit_size, n_outputs=1), trunk, below)
    phases = []
    if cut:
        phases.append(Phase(CUTTING, (Item("the model's file, mapped", info.size_bytes, mapped=True),)))
    if config.space.init == "activation":
        looking = context_of(replace(options, n_seq=1, n_outputs=1), top, label)
        phases.append(Phase("choosing A", (*held, *looking, _activations(space))))
    n_states = shape.n_seq * shape.n_ctx * info.n_embd * 4 if cut else 0
    trained = [
        *context_of(options, top, label, lora_rank=space.rank),
        *([Item(f"values between the parts, of {shape.n_seq} examples", n_states)] if cut else []),
        _losses(info),
        _theta(space, config),
    ]
    phases.append(Phase("training", (*held, *trained)))
    return Plan(tuple(phases))


def to_load(info: ModelInfo, config: TrainConfig, shape: Shape) -> list[Item]:
    """What the peak of training still needs where the examples and the model, or its upper part, are loaded already."""
    later = Plan(tuple(phase for phase in training(info, config, shape).phases if phase.name != CUTTING))
    items = later.peak.items
    loaded = 1 + next(i for i, item in enumerate(items) if item.name.startswith("vocabulary"))
    return list(items[loaded:])


def _activations(space: Space) -> Item:
    """Inputs of every adapted matrix, seen and then joined, and the widest of them centred in float64, twice."""
    n_values = [MAX_TOKENS * matrix.n_in for matrix in space.matrices]
    return Item("inputs of the adapted matrices", 2 * 4 * sum(n_values) + 2 * 8 * max(n_values))


def _theta(space: Space, config: TrainConfig) -> Item:
    """The adapter, theta, and the directions of one step, a bit a number."""
    n_space = sum(space.rank * (matrix.n_in + matrix.n_out) for matrix in space.matrices)
    groups = -(-config.batch.units * config.batch.per_unit // config.estimator.examples_per_probe)
    directions = groups * config.estimator.rounds * space.n_params // 8
    beside = config.n_places * 4 * space.n_params if config.n_places > 1 and config.space.scope == "answer" else 0
    return Item("adapter, theta and directions", 4 * (SPACE_COPIES * n_space + THETA_COPIES * space.n_params) + directions + beside)
