"""Peak memory of evaluating and of training: which weights, contexts and arrays are alive at once, phase by phase.

The one estimate of the project. `train` and `eval` refuse with it what will not fit before they load anything, `gguf plan` shows it. What
llama.cpp holds comes from `gguf_tools.plan`; here is what surrounds it, and which of it exists together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from fwdllama.config import TrainConfig
from fwdllama.layout import is_cut, space_of
from fwdllama.llama.activation import MAX_TOKENS
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import ModelOptions
from fwdllama.loss import VALUES_AT_ONCE
from fwdllama.shortlist import expected_size
from fwdllama.space import Space
from gguf_tools.graph import EXACT_KV_TYPES
from gguf_tools.model import ModelInfo
from gguf_tools.plan import Item, Part, Sizes, context_items, model_items, vocabulary_bytes
from gguf_tools.split import slices

EXAMPLES_BYTES = 12 << 20  # of 4,000 SQuAD questions as Python holds them, with the tokens of those that were drawn
SPACE_COPIES = 5  # of A and B: llama.cpp's, the adapter's, the chosen A, the initial adapter, its file while it is loaded
UNIT_COPIES = 3  # of what enters the lower layers, leaves them, and is joined
THETA_COPIES = 8  # theta, the last update, a probe's offset and position, a step's sum and the direction being added, and a test of it
MIN_OUTPUTS = 64  # logits rows a decode; 64 of a vocabulary of 50,000 are 13 MB

BEHIND = 32  # tokens of an example behind its prompt whose values are kept between the parts: an invocation and a short answer


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
    """What a training run's data decide: tokens and number of sequences, the size of a unit, logits rows, and tokens that have logits (None: all)."""

    n_ctx: int
    n_seq: int
    unit_size: int
    n_outputs: int = MIN_OUTPUTS
    n_logits: int | None = None

    @classmethod
    def expected(cls, config: TrainConfig, n_ctx: int, n_vocab: int, unit_size: int | None = None, n_logits: int | None = None) -> Shape:
        """As data with `unit_size` questions on each paragraph, None for enough of them, will have it with a vocabulary of `n_vocab` tokens,
        of which they make `n_logits`, None for as many as is usual.

        What is held out is whole paragraphs.
        """
        batch = config.batch
        size = min(batch.per_unit, unit_size or batch.per_unit)
        n_seq = -(-batch.held_out // size) * size + max(1, batch.units * batch.per_unit // size) * size
        of_data = config.estimator.vocabulary == "data"
        return cls(n_ctx, n_seq, size, max(MIN_OUTPUTS, n_seq), (n_logits or expected_size(n_vocab)) if of_data else None)


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
        _losses(info.n_vocab),
        Item("examples and their tokens", EXAMPLES_BYTES),
    ]
    return Plan((Phase("answering", tuple(items)),))


def _losses(n_logits: int) -> Item:
    """`fwdllama.loss.token_nll`: exponentials of some logits, of so many tokens."""
    return Item("losses from logits", 4 * max(n_logits, VALUES_AT_ONCE))


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
    """A whole run, on a machine that has neither the A matrices nor anything else from an earlier one."""
    space = space_of(config, info)
    engine, first = config.engine, space.first_layer
    options = training_options(config, shape, 1)
    cut = is_cut(config, info, first)
    top = Part.bare(info, first, info.n_layers, shape.n_logits) if cut else Part.whole(info)
    label = f"layers {first} to {info.n_layers - 1}" if cut else "the model"
    vocabulary = Item("vocabulary", vocabulary_bytes(info))
    weights = model_items(top, label, mmap=engine.mmap, repack=engine.repack)
    start = [Item("examples and their tokens", EXAMPLES_BYTES), *([vocabulary] if cut else [])]
    phases = []
    held = [*start, *weights]
    if cut and engine.stage_layers is None:
        held += _lower(info, config, options, shape, 0, first)
    elif cut:
        bounds = slices(info, first, engine.stage_layers or first)
        for begin, end in pairwise(bounds):
            phases.append(Phase(f"layers {begin} to {end - 1}", (*start, *_lower(info, config, options, shape, begin, end))))
    if config.space.init == "activation":
        looking = context_of(replace(options, n_seq=1, n_outputs=1), top, label)
        phases.append(Phase("choosing A", (*held, *looking, _activations(space))))
    n_kept = shape.n_ctx if config.space.scope == "all" else min(BEHIND, shape.n_ctx)
    trained = [
        *context_of(options, top, label, lora_rank=space.rank),
        *([Item(f"values between the parts, of {shape.n_seq} examples", shape.n_seq * n_kept * info.n_embd * 4)] if cut else []),
        _losses(top.info.n_vocab),
        _theta(space, config),
    ]
    phases.append(Phase("training", (*held, *trained)))
    return Plan(tuple(phases))


def _lower(info: ModelInfo, config: TrainConfig, options: ContextOptions, shape: Shape, first: int, last: int) -> list[Item]:
    """Layers below the trained ones, a context of a unit's sequences, and what enters and leaves them of a unit."""
    part, label = Part.bare(info, first, last), f"layers {first} to {last - 1}"
    context = replace(options, n_seq=shape.unit_size, n_outputs=options.n_batch)
    values = UNIT_COPIES * shape.unit_size * shape.n_ctx * info.n_embd * 4
    return [
        *model_items(part, label, mmap=config.engine.mmap, repack=config.engine.repack),
        *context_of(context, part, label),
        Item(f"values in and out of {label}, of {shape.unit_size} examples", values),
    ]


def to_load(info: ModelInfo, config: TrainConfig, shape: Shape) -> list[Item]:
    """What the peak of training still needs where the examples and the whole model, or the vocabulary of one in parts, are loaded already."""
    items = training(info, config, shape).peak.items
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
    directions = groups * (config.estimator.rounds + config.first_rounds) * space.n_params // 8
    beside = config.n_places * 4 * space.n_params if config.n_places > 1 and config.space.scope == "answer" else 0
    return Item("adapter, theta and directions", 4 * (SPACE_COPIES * n_space + THETA_COPIES * space.n_params) + directions + beside)
