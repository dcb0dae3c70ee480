"""What can be changed to make a run fit a memory, and the setting that changes least and does.

The search is exhaustive: a plan takes a millisecond. Costs say what a change takes away, most of all nothing: mapping a file costs time at
the start only, kernels without rearranged weights cost time throughout, a smaller batch costs more of it, a quantised KV cache adds noise to
losses (and, needing flash attention, makes them depend on what else is decoded), and training higher layers only learns less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

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
DEFAULT_BATCH = 8  # questions of an evaluation, paragraphs of a training run
COSTS = {"mmap": 0.25, "no-repack": 1.0, "batch": 1.0, "q8_0": 3.0, "q4_0": 5.0, "layers": 2.0}  # see above; only their order matters

Task = Literal["eval", "train"]


@dataclass(frozen=True)
class Setting:
    """The options that decide over memory. `from_layer` None: the layers that training chooses; `n_ctx` None: each task's usual."""

    n_ctx: int | None = None
    batch: int = DEFAULT_BATCH
    held_out: int = 32
    scope: Scope = "answer"
    from_layer: int | None = None
    kv_type: str = "f16"
    mmap: bool = False
    repack: bool = True

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise UsageError(f"the KV cache type {self.kv_type!r} is not one of {', '.join(KV_TYPES)}.")

    def config(self, info: ModelInfo) -> TrainConfig:
        """The configuration of a training run with it.

        Raises:
            UsageError: the model has no such layer.
        """
        first, last = layer_band(info.n_layers)
        if self.from_layer is not None:
            if not 0 <= self.from_layer < info.n_layers:
                raise UsageError(f"--from-layer is {self.from_layer}, but {info.path} has layers 0 to {info.n_layers - 1}.")
            first, last = self.from_layer, min(info.n_layers - 1, self.from_layer + last - first)
        return make_config(
            {
                "space": {"scope": self.scope, "layers": (first, last)},
                "batch": {"units": self.batch, "fresh": min(3, self.batch), "held_out": self.held_out},
                "budget": {"steps": 1},
                "engine": {"kv_type": self.kv_type, "mmap": self.mmap, "repack": self.repack},
            }
        )

    def plan(self, info: ModelInfo, task: Task) -> Plan:
        """What the task holds at once."""
        n_ctx = min(info.context_length, self.n_ctx or (EVAL_CTX if task == "eval" else TRAIN_CTX))
        if task == "train":
            config = self.config(info)
            return training(info, config, Shape.expected(config, n_ctx))
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
            layers = self.config(info).space.layers
            assert layers is not None
            words.append(f"--layers {layers[0]}-{layers[1]}")
        return words


def cheapest(info: ModelInfo, asked: Setting, task: Task, memory_bytes: int, base_bytes: int) -> tuple[Setting, Plan] | None:
    """The setting that changes least of `asked` and fits `memory_bytes`, of which the process itself takes `base_bytes`; None: none does."""
    first = asked.config(info).space.layers or (0, 0)
    for setting in sorted(_changed(info, asked, task), key=lambda setting: _cost(info, setting, asked, first[0])):
        plan = setting.plan(info, task)
        if base_bytes + plan.peak.total_bytes <= memory_bytes:
            return setting, plan
    return None


def smallest(info: ModelInfo, asked: Setting, task: Task) -> tuple[Setting, Plan]:
    """The setting that needs least of all that are tried."""
    plans = ((setting, setting.plan(info, task)) for setting in _changed(info, asked, task))
    return min(plans, key=lambda each: each[1].peak.total_bytes)


def _changed(info: ModelInfo, asked: Setting, task: Task) -> Iterator[Setting]:
    weights = dict.fromkeys([(asked.mmap, asked.repack), (True, asked.repack), (asked.mmap, False), (True, False)])
    kv_types = dict.fromkeys([asked.kv_type, *(("q8_0", "q4_0") if asked.kv_type in ("f16", "f32") else ())])
    layers = _layers(info, asked, task)
    for (mmap, repack), kv_type, halved, layer in product(weights, kv_types, range(asked.batch.bit_length()), layers):
        held_out = max(1, asked.held_out >> halved) if task == "train" else asked.held_out
        batch = asked.batch >> halved
        yield replace(asked, mmap=mmap, repack=repack, kv_type=kv_type, batch=batch, held_out=held_out, from_layer=layer)


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
    cost += COSTS["batch"] * (asked.batch.bit_length() - setting.batch.bit_length())
    cost += COSTS.get(setting.kv_type, 0.0) * (setting.kv_type != asked.kv_type)
    if setting.from_layer is not None and setting.from_layer != asked.from_layer:
        cost += COSTS["layers"] * 3 * (setting.from_layer - first) / max(1, info.n_layers - 1 - first)
    return cost
