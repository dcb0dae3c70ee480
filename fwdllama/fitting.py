"""A run that is to stay within so much memory: what of its configuration is changed for that, said in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from fwdllama.config import TrainConfig
from fwdllama.errors import ResourceError
from fwdllama.formats import size
from fwdllama.llama.model import Tokenizer
from fwdllama.machine import process_bytes
from fwdllama.material import Source, material
from fwdllama.setting import Change, Setting, cheapest, smallest
from gguf_tools.model import read_model_info

# What of a run its devices may not choose for themselves.
SHARED: frozenset[Change] = frozenset({"batch", "held_out", "from_layer"})


def fitted(
    config: TrainConfig,
    model: Path,
    source: Source,
    memory_bytes: int,
    *,
    kept: Collection[Change] = (),
    on_event: Callable[[str], None] = lambda text: None,
) -> TrainConfig:
    """The configuration that changes least of `config`, nothing of what is `kept`, and trains on `source` within `memory_bytes`.

    Raises:
        ResourceError: there is none; the sentence says how much the smallest needs.
        FwdllamaError: model or data cannot be used.
    """
    info, base = read_model_info(model), process_bytes()
    with Tokenizer(model) as tokenizer:
        shape = material(config, source.load(), str(source.path), tokenizer).shape
    asked = Setting.of(config, shape)
    found = cheapest(info, asked, "train", memory_bytes, base, kept=kept)
    if found is None:
        setting, plan = smallest(info, asked, "train", kept=kept)
        least = size(base + plan.peak.total_bytes)
        words = " ".join(setting.options(asked, info, "train")) or "nothing changed"
        raise ResourceError(
            f"{model} cannot be trained within {size(memory_bytes)}: the smallest setting that may be chosen ({words}) needs {least}, "
            f"most of all while {plan.peak.name}. Give more, a smaller --ctx, or a smaller model."
        )
    setting, plan = found
    words = " ".join(setting.options(asked, info, "train"))
    on_event(
        f"within {size(memory_bytes)}: {words or 'nothing needs to be changed'}; {size(base + plan.peak.total_bytes)} at most, while {plan.peak.name}"
    )
    return config if setting == asked else setting.config(info)
