"""What a run tells while it goes on, and the clocks that it looks at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fwdllama.checkpoint import State


@dataclass(frozen=True)
class Progress:
    """What a display may show at any moment; `step_probes` of `step_wanted` probes of the current step are done."""

    state: State
    metrics: dict[str, Any] | None  # the row just recorded, None within a step
    step_probes: int
    step_wanted: int
    fraction: float


@dataclass
class Clock:
    """Wall clock and engine time of this process; `decode_s` counts what was spent inside the model. Replaceable in tests."""

    now: Callable[[], float] = time.monotonic
    decode_s: Callable[[], float] = lambda: 0.0
    n_tokens: Callable[[], int] = lambda: 0
    peak_memory_bytes: Callable[[], int] = lambda: 0
