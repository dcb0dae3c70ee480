"""What can be changed to make a run fit a memory, and the setting that changes least and does.

The search is exhaustive: a plan takes a millisecond. Costs say what a change takes away, most of all nothing: mapping a file costs time at
the start only, staging the time to read it in slices and room on disk, kernels without rearranged weights cost time throughout, a smaller batch
costs more of it, a quantised KV cache adds noise to losses (and, needing flash attention, makes them depend on what else is decoded), and
training higher layers only learns less.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from fwdllama.config import TrainConfig, layer_band, make_config
from fwdllama.errors import UsageError
from fwdllama.llama.context import KV_TYPES
from fwdllama.llama.model import ModelOptions
from fwdllama.memory import Plan, Shape, engine_options, evaluation, training
from fwdllama.types import Scope
from gguf_tools.model import ModelInfo
from gguf_tools.plan import repacked_types
from gguf_tools.split import can_be_cut

EVAL_CTX, TRAIN_CTX = 1024, 256  # what `eval` defaults to, and what training chooses for SQuAD
MOST_SLICES = 12  # that are looked for
DEFAULT_BATCH = 8  # questions of an evaluation, paragraphs of a training run
COSTS = {"mmap": 0.25, "staged": 0.75, "slices": 0.01, "no-repack": 1.0, "batch": 1.0, "q8_0": 3.0, "q4_0": 5.0, "layers": 2.0}  # see above

Task = Literal["eval", "train"]
Change = Literal["mmap", "repack", "kv_type", "batch", "held_out", "from_layer", "stage_layers"]


@dataclass(frozen=True)
class Setting:
    """The options that decide over memory. `from_layer` None: the layers that training chooses; `n_ctx` None: each task's usual.

    `base` is what else is set for training, None for the defaults; `unit_size` how many questions the data have on a paragraph, None for as
    many as are taken; `n_logits` how many tokens they are made of, None for as many as is usual.
    """

    n_ctx: int | None = None
    batch: int = DEFAULT_BATCH
    held_out: int = 32
    scope: Scope = "answer"
    from_layer: int | None = None
    kv_type: str = "f16"
    mmap: bool = False
    repack: bool = True
    stage_layers: int | None = None
    base: TrainConfig | None = None
    unit_size: int | None = None
    n_logits: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, shape: Shape) -> Setting:
        """What a training run's configuration says, for data of this shape."""
        engine, batch = config.engine, config.batch
        return cls(
            shape.n_ctx,
            batch.units,
            batch.held_out,
            config.space.scope,
            None,
            engine.kv_type,
            engine.mmap,
            engine.repack,
            engine.stage_layers,
            config,
            shape.unit_size,
            shape.n_logits,
        )

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise UsageError(f"the KV cache type {self.kv_type!r} is not one of {', '.join(KV_TYPES)}.")

    def config(self, info: ModelInfo) -> TrainConfig:
        """The configuration of a training run with it.

        Raises:
            UsageError: the model has no such layer.
        """
        base = self.base or make_config({"budget": {"steps": 1}})
        layers = base.space.layers or layer_band(info.n_layers)
        if self.from_layer is not None:
            layers = layers_from(info, self.from_layer, layers)
        sections: dict[str, dict[str, Any]] = {
            "space": {"scope": self.scope, "layers": layers},
            "estimator": {"examples_per_probe": min(base.estimator.examples_per_probe, self.batch * base.batch.per_unit)},
            "batch": {"units": self.batch, "fresh": min(base.batch.fresh, self.batch), "held_out": self.held_out},
            "engine": {"kv_type": self.kv_type, "mmap": self.mmap, "repack": self.repack, "stage_layers": self.stage_layers},
        }
        values = base.model_dump()
        return make_config({**values, **{name: {**values[name], **section} for name, section in sections.items()}})

    def plan(self, info: ModelInfo, task: Task) -> Plan:
        """What the task holds at once."""
        n_ctx = min(info.context_length, self.n_ctx or (EVAL_CTX if task == "eval" else TRAIN_CTX))
        if task == "train":
            config = self.config(info)
            return training(info, config, Shape.expected(config, n_ctx, info.n_vocab, self.unit_size, self.n_logits))
        options = engine_options(batch=self.batch, n_ctx=n_ctx, n_threads=1, kv_type=self.kv_type)
        return evaluation(info, options, ModelOptions(mmap=self.mmap, repack=self.repack))

    def options(self, asked: Setting, info: ModelInfo, task: Task) -> list[str]:
        """How `eval` or `train` is told what differs from `asked`."""
        words = []
        if self.mmap != asked.mmap:
            words.append("--mmap")
        if self.repack != asked.repack:
            words.append("--no-repack")
        if self.kv_type != asked.kv_type:
            words.append(f"--kv-type {self.kv_type}")
        if self.batch != asked.batch:
            words.append(f"--batch {self.batch}" if task == "eval" else f"--units {self.batch} --fresh {min(3, self.batch)}")
        if task == "train" and self.held_out != asked.held_out:
            words.append(f"--held-out {self.held_out}")
        if task == "train" and self.from_layer != asked.from_layer:
            words.append(f"--from-layer {self.from_layer}")
        if task == "train" and self.stage_layers != asked.stage_layers:
            words.append(f"--stage-layers {self.stage_layers}")
        return words


def layers_from(info: ModelInfo, first: int, layers: tuple[int, int]) -> tuple[int, int]:
    """As many layers as `layers` are, from `first` on, as far as the model has them.

    Raises:
        UsageError: it has no layer `first`.
    """
    if not 0 <= first < info.n_layers:
        raise UsageError(f"--from-layer is {first}, but {info.path} has layers 0 to {info.n_layers - 1}.")
    return first, min(info.n_layers - 1, first + layers[1] - layers[0])


def cheapest(
    info: ModelInfo, asked: Setting, task: Task, memory_bytes: int, base_bytes: int, *, kept: Collection[Change] = ()
) -> tuple[Setting, Plan] | None:
    """The setting that changes least of `asked`, nothing of what is `kept`, and fits `memory_bytes`, of which the process itself takes
    `base_bytes`; None: none does.
    """
    first = asked.config(info).space.layers or (0, 0)
    for setting in sorted(_changed(info, asked, task, kept), key=lambda setting: _cost(info, setting, asked, first[0])):
        plan = setting.plan(info, task)
        if base_bytes + plan.peak.total_bytes <= memory_bytes:
            return setting, plan
    return None


def smallest(info: ModelInfo, asked: Setting, task: Task, *, kept: Collection[Change] = ()) -> tuple[Setting, Plan]:
    """The setting that needs least of all that are tried."""
    plans = ((setting, setting.plan(info, task)) for setting in _changed(info, asked, task, kept))
    return min(plans, key=lambda each: each[1].peak.total_bytes)


def _changed(info: ModelInfo, asked: Setting, task: Task, kept: Collection[Change]) -> Iterator[Setting]:
    mmaps = dict.fromkeys([asked.mmap, *([] if "mmap" in kept else [True])])
    repacks = dict.fromkeys([asked.repack, *([] if "repack" in kept else [False])])
    kv_types = dict.fromkeys([asked.kv_type, *(("q8_0", "q4_0") if asked.kv_type in ("f16", "f32") and "kv_type" not in kept else ())])
    batches = dict.fromkeys(asked.batch >> i for i in range(1 if "batch" in kept else asked.batch.bit_length()))
    layers = [asked.from_layer] if "from_layer" in kept else _layers(info, asked, task)
    for mmap, repack, kv_type, batch, layer in product(mmaps, repacks, kv_types, batches, layers):
        held_out = asked.held_out
        if task == "train" and "held_out" not in kept:
            held_out = max(1, held_out * batch // asked.batch)
        found = replace(asked, mmap=mmap, repack=repack, kv_type=kv_type, batch=batch, held_out=held_out, from_layer=layer)
        yield found
        if task == "train" and "stage_layers" not in kept and asked.stage_layers is None:
            yield from (replace(found, stage_layers=n) for n in _stages(info, found))


def _stages(info: ModelInfo, setting: Setting) -> list[int]:
    """Layers of a slice, where the setting can be staged: one, two, ... slices."""
    config = setting.config(info)
    first = (config.space.layers or (0, 0))[0]
    if not first or not config.engine.trunk or config.estimator.objective != "nll" or not can_be_cut(info, first):
        return []
    return list(dict.fromkeys(-(-first // n) for n in range(1, MOST_SLICES + 1)))


def _layers(info: ModelInfo, asked: Setting, task: Task) -> list[int | None]:
    """Where training may begin: as asked, and in up to three steps towards the last layers, wherever the model can be cut."""
    if task == "eval":
        return [asked.from_layer]
    layers = asked.config(info).space.layers
    assert layers is not None
    cuts = [layer for layer in range(layers[0] + 1, info.n_layers) if can_be_cut(info, layer)] if can_be_cut(info, layers[0]) else []
    return [asked.from_layer, *dict.fromkeys(cuts[i * (len(cuts) - 1) // 3] for i in range(1, 4) if cuts)]


def _cost(info: ModelInfo, setting: Setting, asked: Setting, first: int) -> float:
    """What a setting takes away of `asked`, which trains from layer `first` on."""
    rearranged = any(kind in repacked_types() for _, kind in info.tensors.values())
    cost = COSTS["mmap"] * (setting.mmap != asked.mmap)
    cost += COSTS["no-repack"] * rearranged * (setting.repack != asked.repack)
    if setting.stage_layers != asked.stage_layers:
        assert setting.stage_layers is not None
        cost += COSTS["staged"] + COSTS["slices"] * -(-(setting.from_layer or first) // setting.stage_layers)
    cost += COSTS["batch"] * (asked.batch.bit_length() - setting.batch.bit_length())
    cost += COSTS.get(setting.kv_type, 0.0) * (setting.kv_type != asked.kv_type)
    if setting.from_layer is not None and setting.from_layer != asked.from_layer:
        cost += COSTS["layers"] * 3 * (setting.from_layer - first) / max(1, info.n_layers - 1 - first)
    return cost
