"""The share of the time that a hot machine works: falling while it stays hot, held near the limit, rising as it cools.

Down by a factor and up by a little, as networks share a line (Chiu and Jain 1989): it needs no model of the machine, whose heat takes seconds
to reach one sensor and minutes to reach another. It is told once a look, every few seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

FALL = 0.8  # of the share, a look that finds it too hot
RISE = 0.05  # to the share, a look that finds it cool
COOL_BY_C = 2.0  # below the limit from where on it is cool: in between the share stays, which is where it settles
LEAST = 0.05  # never quite nothing: a sensor that is always hot must not end a run without a word


@dataclass(frozen=True)
class Throttle:
    """How much of the time to work, LEAST..1."""

    share: float = 1.0

    def after(self, excess_c: float | None) -> Throttle:
        """The next, by degrees above the limit; None: nothing can be told, and nothing is limited.

        >>> Throttle(1.0).after(3.0).share
        0.8
        >>> Throttle(0.5).after(-5.0).share
        0.55
        """
        if excess_c is None:
            return Throttle()
        if excess_c > 0:
            return Throttle(max(LEAST, self.share * FALL))
        return Throttle(min(1.0, round(self.share + RISE, 9))) if excess_c < -COOL_BY_C else self

    def owed_s(self, worked_s: float) -> float:
        """Seconds to rest for so many of work.

        >>> Throttle(0.25).owed_s(2.0)
        6.0
        """
        return worked_s * (1.0 / self.share - 1.0)
