"""What a display is told of a rest; apart from the rest itself, because displays of the aggregator use it too and know no engine."""

from __future__ import annotations

from dataclasses import dataclass

from fwdllama.formats import percent


@dataclass(frozen=True)
class Pause:
    """What a display may show: why it rests (`share` 0) or works less; None where it works as usual. `rested_s` since the start."""

    why: str | None
    share: float
    rested_s: float


def paced(pause: Pause) -> str:
    """A pause in a few words, empty where there is none.

    >>> paced(Pause("the battery is at 20%, below 30%", 0.0, 12.0))
    'resting: the battery is at 20%, below 30%'
    >>> paced(Pause("cpu-0 has 91 °C, above 80 °C", 0.4, 12.0))
    'working 40% of the time: cpu-0 has 91 °C, above 80 °C'
    """
    if pause.why is None:
        return ""
    return f"resting: {pause.why}" if pause.share == 0 else f"working {percent(pause.share)} of the time: {pause.why}"
