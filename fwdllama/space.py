"""Which numbers are trained: modules x layers x rank, and how the flat vector theta maps to the adapter's tensors.

A is drawn from its own seed and, with `train = "b"`, stays as drawn: the adapter then starts at exactly the base model (B = 0) and
its loss is linear in B to first order everywhere. theta is float32 and the master copy; adapters are written from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fwdllama.direction import SEED_BITS
from fwdllama.errors import UsageError

MODULES: Mapping[str, str] = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
Theta = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """One adapted weight: its B (n_out, rank) at theta[b_start:], and with train = "ab" its A (rank, n_in) at theta[a_start:]."""

    name: str
    n_out: int
    n_in: int
    b_start: int
    a_start: int | None


@dataclass(frozen=True)
class Space:
    """The trained subspace of one model. Build it with `build_space`."""

    matrices: tuple[Matrix, ...]
    rank: int
    alpha: float
    train: Literal["b", "ab"]
    seed: int
    n_params: int
    first_layer: int
    last_layer: int
    a: Mapping[str, NDArray[np.float32]] | None = field(default=None, compare=False, repr=False)  # None: drawn from seed

    def initial_a(self) -> dict[str, NDArray[np.float32]]:
        """A of every matrix, float32 (rank, n_in): `a` where given, else independent uniform numbers of variance 1 / n_in.

        Uniform from raw Philox words, not normal, so that every platform draws the same bits.
        """
        if self.a is not None:
            return dict(self.a)
        drawn = {}
        for index, matrix in enumerate(self.matrices):
            raw = np.random.Philox(key=np.array([self.seed, index], np.uint64)).random_raw(self.rank * matrix.n_in)
            unit = (raw >> np.uint64(40)).astype(np.float64) / (1 << 24) * 2.0 - 1.0
            values = unit * np.sqrt(3.0 / matrix.n_in)
            drawn[matrix.name] = values.astype(np.float32).reshape(self.rank, matrix.n_in)
        return drawn

    def initial_theta(self) -> Theta:
        """Where training starts: B = 0, and A as drawn where it is trained."""
        theta = np.zeros(self.n_params, np.float32)
        if self.train == "ab":
            drawn = self.initial_a()
            for matrix in self.matrices:
                assert matrix.a_start is not None
                theta[matrix.a_start : matrix.a_start + self.rank * matrix.n_in] = drawn[matrix.name].ravel()
        return theta

    def views(self, theta: Theta) -> Iterator[tuple[str, Theta]]:
        """(tensor name, view of theta) for every trained tensor, e.g. ("blk.0.attn_q.weight.lora_b", (n_out, rank))."""
        for m in self.matrices:
            if m.a_start is not None:
                yield f"{m.name}.lora_a", theta[m.a_start : m.a_start + self.rank * m.n_in].reshape(self.rank, m.n_in)
            yield f"{m.name}.lora_b", theta[m.b_start : m.b_start + m.n_out * self.rank].reshape(m.n_out, self.rank)

    def tensors(self, theta: Theta) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Name -> (A (rank, n_in), B (n_out, rank)), what an adapter file holds."""
        trained = dict(self.views(theta))
        frozen = self.initial_a() if self.train == "b" else {}
        return {
            m.name: (frozen[m.name] if m.a_start is None else trained[f"{m.name}.lora_a"].copy(), trained[f"{m.name}.lora_b"].copy())
            for m in self.matrices
        }


def build_space(
    shapes: Mapping[str, tuple[int, int]],  # weight name -> (n_out, n_in), as in the model file
    n_layers: int,
    *,
    modules: Sequence[str],
    layers: tuple[int, int] | None,
    rank: int,
    alpha: float,
    train: Literal["b", "ab"],
    seed: int,
) -> Space:
    """Lay theta out for the matrices `modules` x `layers` (first, last inclusive; None for all).

    Raises:
        UsageError: an unknown module, layers outside the model, or a rank that is not positive.
    """
    unknown = [name for name in modules if name not in MODULES]
    if unknown or not modules:
        hint = " token_embd cannot be trained: with tied embeddings it is the output matrix too." if "token_embd" in unknown else ""
        raise UsageError(f"module {', '.join(unknown) or '(none)'!r} is not one of {', '.join(MODULES)}.{hint}")
    repeated = sorted({name for name in modules if modules.count(name) > 1})
    if repeated:
        raise UsageError(f"module {', '.join(repeated)!r} is named twice, but each can be trained once.")
    if not 0.0 < alpha < math.inf:
        raise UsageError(f"alpha is {alpha}, but must be a positive number.")
    if not 0 <= seed < 1 << SEED_BITS:
        raise UsageError(f"seed {seed} is not an unsigned {SEED_BITS}-bit number.")
    first, last = layers if layers is not None else (0, n_layers - 1)
    if not 0 <= first <= last < n_layers:
        raise UsageError(f"layers {first}-{last} are outside the model, which has layers 0-{n_layers - 1}.")
    if rank < 1:
        raise UsageError(f"rank is {rank}, but must be at least 1.")
    matrices, start = [], 0
    for layer in range(first, last + 1):
        for module in modules:
            name = f"blk.{layer}.{MODULES[module]}.weight"
            if name not in shapes:
                raise UsageError(f"the model has no tensor {name}, so module {module!r} cannot be trained in layer {layer}.")
            n_out, n_in = shapes[name]
            if rank > min(n_out, n_in):
                raise UsageError(f"rank {rank} exceeds the smaller side of {name} ({n_out} x {n_in}).")
            a_start = None
            if train == "ab":
                a_start, start = start, start + rank * n_in
            matrices.append(Matrix(name, n_out, n_in, start, a_start))
            start += n_out * rank
    return Space(tuple(matrices), rank, alpha, train, seed, start, first, last)
