"""What the adapted matrices see: their inputs on answer tokens, and the A matrices that follow from them.

A's rows are the leading principal directions of a module's inputs over the tokens where the adapter is on, unscaled. Against random
rows the useful part of the slope per unit of curvature grows 1.1 to 4 times, by module (LOG.md); scaling the rows to equal energy,
as whitening does, destroys it, because directions that hardly occur then cost as much noise as those that do.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.binding import TensorHead, ggml, layout_is_known
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.prompts import decode
from fwdllama.llama.trunk import Below
from fwdllama.types import Encoded, Scope

log = logging.getLogger("fwdllama.llama")

Inputs = Mapping[str, NDArray[np.float32]]  # weight name -> (n_tokens, n_in)
MAX_TOKENS = 512  # per matrix: far more than a rank needs, and little memory on any model


def module_inputs(
    model: Model,
    options: ContextOptions,
    examples: Sequence[Encoded],
    names: Sequence[str],
    scope: Scope,
    trunk: Below | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Inputs of the weights `names` on the tokens where an adapter of `scope` is on, in the base model.

    Raises:
        EngineError: this build of llama.cpp does not let us look.
    """
    library = ggml()
    if library is None or not layout_is_known():
        raise EngineError("this build's tensors cannot be read; choose --init random.")
    first = trunk.first if trunk else 0
    own = {_renumbered(name, -first): name for name in names}
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    seen = dict.fromkeys(own, 0)
    watching = False

    def look(node: int, ask: bool, _user_data: object) -> bool:
        if not watching:
            return not ask
        sources = TensorHead.from_address(node).src
        weight = library.ggml_get_name(sources[0]).decode() if sources[0] and sources[1] else ""
        if weight not in own or seen[weight] >= MAX_TOKENS:  # a prompt of scope `all` alone may have more than all that are used
            return not ask
        if not ask:
            head = TensorHead.from_address(sources[1])
            if head.type != 0 or head.nb[0] != 4:
                return True
            values = np.empty((head.ne[3] * head.ne[2] * head.ne[1], head.ne[0]), np.float32)
            library.ggml_backend_tensor_get(sources[1], values.ctypes.data, 0, values.nbytes)
            found[own[weight]].append(values)
            seen[weight] += len(values)
        return True

    with Context(model, replace(options, n_seq=1, n_outputs=1), eval_callback=look) as context:
        for example in examples:
            context.clear()
            behind = np.array(example.invocation + example.target[:-1], np.int32)
            prompt = np.array(example.prompt, np.int32)
            states = trunk.states([prompt], [behind])[0] if trunk else None
            watching = scope == "all"
            decode(context, 0, 0, prompt if states is None else states[: len(prompt)])
            watching = True
            # The last token asks for logits: otherwise the last layer's feed-forward part would be left out.
            positions = np.arange(len(prompt), len(prompt) + len(behind), dtype=np.int32)
            wants = np.zeros(len(behind), np.int8)
            wants[-1] = 1
            inputs = behind if states is None else states[len(prompt) :]
            context.decode(inputs, positions, np.zeros(len(behind), np.int32), wants)
    missing = [name for name in names if not found[name]]
    if missing:
        raise EngineError(f"the inputs of {missing[0]} were not seen in the graph; choose --init random.")
    return {name: np.concatenate(parts)[:MAX_TOKENS] for name, parts in found.items()}


def _renumbered(name: str, by: int) -> str:
    block, layer, rest = name.split(".", 2)
    return f"{block}.{int(layer) + by}.{rest}"


def principal_rows(inputs: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    """The `rank` leading principal directions of centred inputs (n_tokens, n_in), orthonormal rows, float32 (rank, n_in).

    Each row's largest entry is positive, so that the result does not depend on the linear algebra library's choice of sign. Where
    the inputs span fewer directions, the rest are zero rows, which train nothing.
    """
    centred = inputs.astype(np.float64) - inputs.mean(axis=0, dtype=np.float64)
    # Through the small side: n_tokens is at most MAX_TOKENS, n_in may be 11008.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    rows = np.zeros((rank, inputs.shape[1]))
    for i, k in enumerate(np.argsort(values)[::-1][:rank]):
        if values[k] > 1e-9 * max(values.max(), 1e-30):
            row = vectors[:, k] @ centred
            row /= np.linalg.norm(row)
            rows[i] = row * np.sign(row[np.argmax(np.abs(row))])
    return rows.astype(np.float32)


def activation_a(inputs: Inputs, rank: int) -> dict[str, NDArray[np.float32]]:
    """A of every matrix from its inputs. Modules that share an input array of equal content share the work."""
    done: dict[tuple[str, int], NDArray[np.float32]] = {}
    result = {}
    for name, values in inputs.items():
        layer = re.match(r"blk\.\d+", name)
        key = (layer.group() if layer else name, hash(values.tobytes()))
        if key not in done:
            done[key] = principal_rows(values, rank)
        result[name] = done[key]
    return result


def cached_rows(path: Path, names: Sequence[str]) -> dict[str, NDArray[np.float32]] | None:
    """A as `store_rows` left it, or None where there is none for these names, or a damaged one."""
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file:  # np.load itself would leave a damaged file open
            held = np.load(file)
            rows = {name: held[name].astype(np.float32) for name in names}
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
        log.warning("%s is damaged and is made anew", path)
        return None
    return rows


def store_rows(path: Path, rows: Mapping[str, NDArray[np.float32]]) -> None:
    """Keep A for the next run on the same model and data; a cache that cannot be written is only slower."""
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, allow_pickle=False, **dict(rows))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
