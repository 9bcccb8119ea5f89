"""How fast a count grew over the last minute. Knows neither what is counted nor who looks."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 60.0


class LastMinute:
    """A count that only grows, looked at now and then."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float]] = deque()  # (when, the count), the first a minute ago or more

    def rate(self, count: float, now: float) -> float:
        """Note the count by now, in monotonic seconds; return its growth per second, 0 at the first look."""
        self._looks.append((now, count))
        while len(self._looks) > 2 and self._looks[1][0] <= now - WINDOW_SECONDS:
            self._looks.popleft()
        then, count_then = self._looks[0]
        return max(0.0, count - count_then) / (now - then) if now > then else 0.0
