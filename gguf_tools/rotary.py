"""How Hugging Face and llama.cpp lay out the rotated rows of q and k, and how LLaMA 3 slows its rotations down.

Rotary embedding turns pairs of numbers within a head. Hugging Face pairs number i with i + head_dim/2, llama.cpp's LLaMA
pairs 2i with 2i + 1, so the rows of W_q and W_k (and of an adapter's B for them) are reordered within each head.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def interleaved(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows (n_heads * head_dim, n) of whole heads, from Hugging Face's order to llama.cpp's.

    >>> interleaved(np.arange(4, dtype=np.float32).reshape(4, 1), 4).ravel().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halved(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """The inverse of `interleaved`."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(
    head_dim: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> NDArray[np.float32]:
    """By how much each rotation is slowed down: (head_dim / 2,), what llama.cpp calls rope_freqs.

    Rotations that complete `high_freq_factor` or more turns within the original context stay, those of at most
    `low_freq_factor` turns are slowed by `factor`, and the frequency is interpolated linearly in between
    (Llama 3.1, `rope_type` "llama3").
    """
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)  # radians a position
    turns = original_context * frequency / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    divisors: NDArray[np.float32] = (1 / ((1 - kept) / factor + kept)).astype(np.float32)
    return divisors
