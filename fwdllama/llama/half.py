"""Values between layers in half precision: two bytes a number, and a scale a token for those that half precision cannot hold.

Some models have single activations of tens of thousands; half precision ends at 65,504. A token whose largest value is beyond it is divided by a
power of two, which changes nothing else about it. The rounding, 5e-4 of a value, is a tenth of what INT8 kernels do to the same values next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Half = NDArray[np.float16]
Exponents = NDArray[np.int8]
LARGEST = 15  # values below 2**15 are left as they are


def halved(states: NDArray[np.float32]) -> tuple[Half, Exponents]:
    """Values (n_tokens, n_embd) as half precision numbers, and the power of two that each token was divided by.

    >>> values, exponents = halved(np.array([[0.5, -3.0], [1.0, 100_000.0]], np.float32))
    >>> exponents, restored(values, exponents).tolist()
    (array([0, 2], dtype=int8), [[0.5, -3.0], [1.0, 99968.0]])
    """
    _, exponents = np.frexp(np.abs(states).max(axis=1, initial=0.0))
    scale = np.maximum(exponents - LARGEST, 0).astype(np.int8)
    return np.ldexp(states, -scale[:, None].astype(np.int32)).astype(np.float16), scale


def restored(values: Half, exponents: Exponents) -> NDArray[np.float32]:
    """What `halved` took apart, rounded, float32 (n_tokens, n_embd)."""
    return np.ldexp(values.astype(np.float32), exponents[:, None].astype(np.int32))


def rounded(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values as they come back from half precision."""
    return restored(*halved(states))
