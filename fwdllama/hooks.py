"""What a caller hears of a run that goes on, and how it ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fwdllama.progress import Progress
from fwdllama.types import Staged


@dataclass
class Hooks:
    """What a caller wants to hear of and may do while a run goes on."""

    on_event: Callable[[str], None] = lambda text: None  # one line about set-up
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_staged: Callable[[Staged], None] = lambda staged: None  # while lower layers are computed before training
    stop: Callable[[], bool] = lambda: False
    rest: Callable[[], None] = lambda: None  # between pieces of work: may wait as long as the device must
    device: Mapping[str, Any] = field(default_factory=dict)  # how the device is treated, kept with the run for those who resume it
