"""A run's examples: read from a file, split, made into tokens, and laid out in batches.

Tokens of an example, outputs of a decode and sequences of a context follow from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fwdllama.batches import EncodedUnits, RollingBatches, groups_of, shuffled
from fwdllama.config import TrainConfig
from fwdllama.encode import Encoder, model_template
from fwdllama.layout import is_cut, space_of
from fwdllama.llama.model import Tokenizer
from fwdllama.memory import MIN_OUTPUTS, Shape
from fwdllama.shortlist import Shortlist, shortlisted
from fwdllama.tasks import Kind
from fwdllama.tasks.load import load_dataset, split_by_group
from fwdllama.types import Dataset, Encoded
from gguf_tools.plan import whole_cells

FIT = 0.7  # the context is the smallest multiple of 256 tokens that so much of the data fits
SAMPLE = 64  # examples that the sizes follow from
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Source:
    """Where a run's examples come from: a file, and how it is read."""

    path: Path
    kind: Kind | None = None  # None: told from the content
    labels: dict[str, str] | None = None
    limit: int | None = None

    def load(self) -> Dataset:
        """Read it.

        Raises:
            DataError: it cannot be used.
        """
        return load_dataset(self.path, kind=self.kind or "auto", labels=self.labels, limit=self.limit)


@dataclass(frozen=True)
class Material:
    """What a run trains on and watches; `sample` are some examples, a unit each, that fit; `shortlist` the tokens that losses look at, None:
    all, as where the model is not cut.
    """

    units: EncodedUnits
    batches: RollingBatches
    held_out: list[Encoded | None]
    sample: list[Encoded]
    invocation: tuple[int, ...]
    shape: Shape
    shortlist: Shortlist | None

    def watched(self) -> list[list[Encoded]]:
        """The held-out examples by unit, as their rows stand."""
        found: dict[int | None, list[Encoded]] = {}
        for example in self.held_out:
            if example is not None:
                found.setdefault(example.unit, []).append(example)
        return list(found.values())


def material(config: TrainConfig, dataset: Dataset, source: str, tokenizer: Tokenizer) -> Material:
    """The examples of `dataset`, which was read from `source`.

    Raises:
        DataError: none can be used.
    """
    train_set, watched = split_by_group(dataset, _held_out_share(config, dataset), config.seed)
    encoder = Encoder(tokenizer, model_template(tokenizer, config.template, dataset.kind))
    size = config.batch.per_unit
    groups, watched_groups = groups_of(train_set.examples, size), groups_of(watched.examples, size)
    unit_size = max(len(group) for group in (*groups, *watched_groups))
    sample = [encoder.example(groups[i][0]) for i in shuffled(config.seed, 0, len(groups))[:SAMPLE]]
    n_ctx = config.batch.n_ctx or _fitting([e.n_tokens for e in sample], tokenizer.info.context_length)
    n_outputs = max(MIN_OUTPUTS, *(len(e.target) for e in sample))
    n_outputs = min(n_outputs, config.engine.n_batch - len(encoder.invocation))
    units = EncodedUnits(groups, encoder.example, n_ctx, source, n_outputs)
    batches = RollingBatches(
        units,
        unit_size=unit_size,
        n_slots=max(1, config.batch.units * size // unit_size),
        fresh=max(1, config.batch.fresh * size // unit_size),
        seed=config.seed,
    )
    held_out = _held_out_rows(EncodedUnits(watched_groups, encoder.example, n_ctx, source, n_outputs), config)
    info = tokenizer.info
    of_data = config.estimator.vocabulary == "data" and is_cut(config, info, space_of(config, info).first_layer)
    chosen = shortlisted(encoder, dataset.examples, tokenizer.n_vocab) if of_data else None
    n_logits = None if chosen is None else len(chosen)
    shape = Shape(n_ctx, len(held_out) + batches.n_slots * unit_size, unit_size, n_outputs, n_logits)
    fitting = [e for e in sample if e.n_tokens <= n_ctx] or [e for e in batches.batch(0)[0] if e is not None]
    return Material(units, batches, held_out, fitting, encoder.invocation, shape, chosen)


def _fitting(lengths: list[int], most: int) -> int:
    """The smallest multiple of llama.cpp's cell granularity that FIT of the examples fit."""
    wanted = sorted(lengths)[int(FIT * (len(lengths) - 1))]
    return min(most, whole_cells(wanted))


def _held_out_share(config: TrainConfig, dataset: Dataset) -> float:
    """Enough for the watched examples, and never more than a tenth of the data."""
    return min(HELD_OUT_FRACTION, 4 * config.batch.held_out / max(1, len(dataset.examples)))


def _held_out_rows(units: EncodedUnits, config: TrainConfig) -> list[Encoded | None]:
    """Rows of watched examples, whole units, from as many paragraphs as possible."""
    rows: list[Encoded | None] = []
    n = 0
    for index in shuffled(config.seed, 1, len(units)):
        unit = units[int(index)]
        if unit and n < config.batch.held_out:
            rows += [replace(example, unit=-1000 - int(index)) for example in unit]
            n += len(unit)
    return sorted(rows, key=lambda row: len(row.target) if row else 0)
