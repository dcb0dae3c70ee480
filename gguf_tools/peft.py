"""LoRA adapters as PEFT keeps them, to adapters in memory and back: a folder of adapter_config.json and safetensors.

Both compute W x + scale * B A x, but PEFT's scale is made of settings per module and llama.cpp's is alpha / rank with one alpha
for all. Where the settings differ between modules, what one alpha cannot say goes into B. What llama.cpp would leave out
(magnitudes, biases, whole modules) is refused, because the result would load and answer as another model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from gguf_tools.adapter import NAMESPACE, Adapter, adapter_bytes
from gguf_tools.document import read_object
from gguf_tools.errors import FileError
from gguf_tools.model import ModelInfo
from gguf_tools.output import new_file
from gguf_tools.rotary import halved, interleaved
from gguf_tools.safetensors import open_safetensors, safetensors_bytes
from gguf_tools.validate import check_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Whether converting a model of the architecture reorders the rows of q and k.
_REORDERED = {"llama": True, "qwen2": False, "qwen3": False, "gemma": False, "gemma2": False, "gemma3": False}
_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
# Settings that change what is computed, by what they may be besides absent; the rest concern training only.
_UNSUPPORTED = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
                "use_qalora", "fan_in_fan_out", "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
                "megatron_config")  # fmt: skip
_HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base model's weights, or the formula
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_OUTPUT_COPY = "base_model.model.lm_head.base_layer.weight"  # PEFT saves the base's own beside an adapted lm_head
_LITERAL = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class _Settings:
    """The settings of an adapter_config.json that matter here."""

    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool  # rank-stabilised: the scale is alpha / sqrt(rank)
    tokens: tuple[int, ...]

    def of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module."""
        return _matching(self.ranks, module, self.rank), _matching(self.alphas, module, self.alpha)


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule for literal patterns: the first that is the end of the name, from the beginning of one of its parts."""
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^")
        if module == literal or (not pattern.startswith("^") and module.endswith(f".{literal}")):
            return value
    return default


def read_peft(folder: str | os.PathLike[str], base: ModelInfo) -> Adapter:
    """Read a PEFT adapter that was trained on the model that `base` was converted from.

    Raises:
        FileError: it is damaged, fits another model, or does what an adapter of llama.cpp cannot.
    """
    folder = Path(folder)
    settings = _read_settings(folder / CONFIG)
    file = open_safetensors(folder / WEIGHTS)
    names = {module: name for name, module in _module_names(base).items()}
    halves: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, stored in file.tensors.items():
        if key == _OUTPUT_COPY and stored.shape == base.tensors.get("output.weight", ((), ""))[0]:
            continue
        module, half = _parsed(file.path, key)
        if module not in names:
            raise FileError(f"{file.path}: {key[:160]} belongs to no matrix that is adapted in a {base.architecture} model.")
        halves.setdefault(module, {})[half] = file.read(key)
    if not halves:
        raise FileError(f"{file.path}: holds no tensors, but an adapter has at least one lora_A and lora_B.")
    tensors: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    alphas: dict[str, float] = {}
    for module, pair in halves.items():
        name = names[module]
        if len(pair) != 2:
            raise FileError(f"{file.path}: {module} has lora_{'AB'['A' in pair]} missing, but A and B come in pairs.")
        rank, alpha = settings.of(module)
        _check_shapes(file.path, module, rank, pair, base, name)
        tensors[name] = pair["A"], interleaved(pair["B"], base.key_length) if _is_reordered(base, name) else pair["B"]
        alphas[name] = alpha * math.sqrt(rank) if settings.root else alpha
    common = _most_common(alphas.values())
    if common == 0:
        raise FileError(f"{settings.path}: lora_alpha is 0, which switches the adapter off.")
    return Adapter(
        architecture=base.architecture,
        alpha=common,
        tensors={name: (a, _times(b, alphas[name] / common)) for name, (a, b) in tensors.items()},
        scope="answer" if settings.tokens else "all",
        invocation_tokens=settings.tokens,
        metadata={key: value for key, value in file.metadata.items() if key.startswith(NAMESPACE)},
    )


def _most_common(values: Any) -> Any:
    """The most frequent value, the first of several."""
    return Counter(values).most_common(1)[0][0]


def _times(b: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    return b if factor == 1 else (b.astype(np.float64) * factor).astype(np.float32)


def _parsed(path: Path, key: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and which half it is."""
    match = _KEY.fullmatch(key)
    if match:
        return match[1], match[2]
    for mark, what in (("lora_magnitude_vector", "a DoRA magnitude"), ("lora_embedding_", "the token embeddings"),
                       (".bias", "a bias"), ("modules_to_save", "a whole module"), ("lora_", "a part of LoRA that is not known")):
        if mark in key:
            raise FileError(f"{path}: {key[:160]} is {what}, which an adapter of llama.cpp cannot hold.")
    raise FileError(f"{path}: {key[:160]} is no lora_A or lora_B but a whole tensor, which an adapter of llama.cpp cannot hold.")


def _check_shapes(
    path: Path, module: str, rank: int, pair: Mapping[str, NDArray[np.float32]], base: ModelInfo, name: str
) -> None:
    if name not in base.tensors:
        raise FileError(f"{path}: adapts {module}, which is {name} and which the base model lacks (tied, or another model).")
    n_out, n_in = base.tensors[name][0]
    for half, wanted in (("A", (rank, n_in)), ("B", (n_out, rank))):
        if pair[half].shape != wanted:
            raise FileError(
                f"{path}: lora_{half} of {module} has shape {pair[half].shape}, but rank {rank} and the base model need {wanted}."
            )


def _read_settings(path: Path) -> _Settings:
    """The settings that matter, every other known to be harmless."""
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise FileError(f"{path}: peft_type is {config.get('peft_type')!r:.80}, but only LORA is converted.")
    if config.get("bias", "none") not in ("none", None):
        raise FileError(f"{path}: bias is {config['bias']!r:.80}, but an adapter of llama.cpp cannot hold biases.")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise FileError(f"{path}: {key} is {config[key]!r:.80}, which an adapter of llama.cpp cannot express.")
    start = config.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _HARMLESS_INIT):
        raise FileError(
            f"{path}: init_lora_weights is {start!r:.80}, which changes the base model too; "
            "save it with path_initial_model_for_weight_conversion first."
        )
    tokens = config.get("alora_invocation_tokens") or []
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise FileError(f"{path}: alora_invocation_tokens is {tokens!r:.80}, but must be a list of token ids.")
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise FileError(f"{path}: {key} is {pattern!r:.80}, but must be an object.")
        for name in pattern:
            if not _LITERAL.fullmatch(name):  # a stranger's regular expression could take for ever
                raise FileError(f"{path}: {key} has the pattern {name!r:.80}, but only names of modules are understood.")
    return _Settings(
        path=path,
        rank=_rank(path, "r", config.get("r")),
        alpha=_alpha(path, "lora_alpha", config.get("lora_alpha")),
        ranks={name: _rank(path, f"rank_pattern of {name}", rank) for name, rank in patterns["rank_pattern"].items()},
        alphas={name: _alpha(path, f"alpha_pattern of {name}", alpha) for name, alpha in patterns["alpha_pattern"].items()},
        root=bool(config.get("use_rslora")),
        tokens=tuple(tokens),
    )


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 16:
        raise FileError(f"{path}: {key:.160} is {value!r:.80}, but must be a positive integer.")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise FileError(f"{path}: {key:.160} is {value!r:.80}, but must be a finite number.")
    return float(value)


def write_peft(
    folder: str | os.PathLike[str], adapter: Adapter, base: ModelInfo, *, base_name: str | None = None, force: bool = False
) -> None:
    """Write an adapter of `base` as PEFT loads it; `base_name` is the Hugging Face model it belongs to, by name or path.

    `read_peft` of the result gives the adapter back exactly, except that an alpha of 0, llama.cpp's word for a scale of 1,
    becomes one that says so.

    Raises:
        FileError: the adapter does not fit `base`, whose architecture must be a known one, or the folder holds an adapter
        already and `force` is not given, or cannot be written.
    """
    check_adapter(adapter_bytes(adapter), "the adapter", base)
    modules = _module_names(base)
    unknown = next((name for name in adapter.tensors if name not in modules), None)
    if unknown is not None:
        raise FileError(f"the adapter: {unknown} has no name in a Hugging Face {base.architecture} model that is known here.")
    tensors = {}
    for name, (a, b) in adapter.tensors.items():
        stem = f"base_model.model.{modules[name]}"
        tensors[f"{stem}.lora_A.weight"] = a
        tensors[f"{stem}.lora_B.weight"] = halved(b, base.key_length) if _is_reordered(base, name) else b
    weights = safetensors_bytes(tensors, adapter.metadata)
    config = json.dumps(_config(adapter, base, modules, base_name or base.name), indent=2) + "\n"
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder}: is a file, but a folder to write to was expected.")
    made = _make_folder(folder)
    try:
        with (
            new_file(folder / WEIGHTS, force=force) as weights_path,
            new_file(folder / CONFIG, force=force) as config_path,
        ):
            weights_path.write_bytes(weights)
            config_path.write_text(config)
    except FileError:
        if made:
            with suppress(OSError):  # the sentence that matters is the one on its way
                folder.rmdir()
        raise


def _make_folder(folder: Path) -> bool:
    """Whether it had to be made."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise FileError(f"{folder}: cannot be made: {error.strerror or error}.") from None
    return True


def _config(adapter: Adapter, base: ModelInfo, modules: Mapping[str, str], base_name: str) -> dict[str, Any]:
    ranks = {modules[name]: rank for name, rank in adapter.ranks.items()}
    rank = _most_common(ranks.values())
    others = {module: other for module, other in sorted(ranks.items()) if other != rank}
    alpha = adapter.alpha or float(rank)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": others,
        "alpha_pattern": {} if adapter.alpha else others,
        **_targets(list(ranks), base.n_layers),
    }
    if adapter.scope == "answer":
        config["alora_invocation_tokens"] = list(adapter.invocation_tokens)
    return config


def _targets(modules: list[str], n_layers: int) -> dict[str, Any]:
    """Which modules are adapted: kinds and layers where the same ones are in each layer, as people write it, or all by name."""
    found = [re.fullmatch(r"model\.layers\.(\d+)\..+\.(\w+)", module) for module in modules]
    places = {(int(match[1]), match[2]) for match in found if match}
    layers, kinds = sorted({layer for layer, _ in places}), sorted({kind for _, kind in places})
    if None in found or len(places) != len(layers) * len(kinds):
        return {"target_modules": sorted(modules)}
    return {"target_modules": kinds} | ({} if len(layers) == n_layers else {"layers_to_transform": layers})


def _module_names(base: ModelInfo) -> dict[str, str]:
    """The Hugging Face module of each GGUF tensor that can be adapted."""
    if base.architecture not in _REORDERED:
        known = ", ".join(_REORDERED)
        raise FileError(f"{base.path}: PEFT adapters for {base.architecture!r} are not converted; they are for {known}.")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture)
    names = gguf.get_tensor_name_map(architecture, base.n_layers)
    modules = [f"model.layers.{i}.{module}" for i in range(base.n_layers) for module in _MODULES]
    return {f"{names.get_name(module)}.weight": module for module in modules} | {"output.weight": "lm_head"}


def _is_reordered(base: ModelInfo, name: str) -> bool:
    return _REORDERED[base.architecture] and name.endswith((".attn_q.weight", ".attn_k.weight"))
