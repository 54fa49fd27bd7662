"""A hundred thousand installs at 02:30: what arrives at their collector in each second.

Nothing is sent. Each install decides by the project's own rules: its offset, the waits between the
tries of a drain, and the verdict after it.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from matplotlib.figure import Figure
from tenacity import RetryCallState, Retrying

from app.retry import Delivered, Outcome, RetryAt, judge
from app.schedule import offset
from app.sender import BETWEEN_TRIES, PATIENCE, TRIES

INSTALLS = 100_000
SPREAD_SECONDS = 900
DOWN_SECONDS = 900
CAPACITY = 200
"""Heartbeats a second that the recovering collector accepts; the others get 503."""

RETRY_AFTER = timedelta(seconds=60)
HALF_PAST_TWO = datetime(2026, 5, 2, 2, 30, tzinfo=UTC)

Say = Callable[[str], None]


@dataclass
class Collector:
    """Counts requests; refuses connections while it is down, and requests above its limit."""

    down_seconds: int = 0
    capacity: int | None = None
    arrivals: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)

    def answer(self, at: float) -> Outcome:
        """Return the outcome of a POST that arrives so many seconds after 02:30."""
        second = int(at)
        self.arrivals[second] += 1
        if at < self.down_seconds:
            return Outcome("retryable", duration_ms=1, error="refused")
        if self.capacity is not None and self.accepted[second] >= self.capacity:
            return Outcome("retryable", duration_ms=1, status=503, retry_after=RETRY_AFTER)
        self.accepted[second] += 1
        return Outcome("sent", duration_ms=1, status=202)


def simulate(collector: Collector, spread_seconds: int) -> None:
    """Let every install send its heartbeat of one day."""
    rng = random.Random(20260502)  # noqa: S311 - a simulation that can be repeated
    random.seed(20260502)  # tenacity's own
    due = [
        (offset(UUID(int=rng.getrandbits(128), version=4), spread_seconds).total_seconds(), install)
        for install in range(INSTALLS)
    ]
    heapq.heapify(due)
    drains, tries = [1] * INSTALLS, [0] * INSTALLS
    while due:
        at, install = heapq.heappop(due)
        outcome = collector.answer(at)
        tries[install] += 1
        asked = outcome.retry_after or timedelta()
        if outcome.result == "retryable" and tries[install] < TRIES and asked <= PATIENCE:
            wait = max(BETWEEN_TRIES(_state(tries[install])), asked.total_seconds())
            heapq.heappush(due, (at + wait, install))
            continue
        now = HALF_PAST_TWO + timedelta(seconds=at)
        match judge(outcome, drains[install], now, rng.random()):
            case Delivered():
                continue
            case RetryAt(again, _):
                drains[install] += 1
                tries[install] = 0
                heapq.heappush(due, ((again - HALF_PAST_TWO).total_seconds(), install))


def _state(tries: int) -> RetryCallState:
    """Return tenacity's state after so many tries."""
    state = RetryCallState(Retrying(), fn=None, args=(), kwargs={})
    state.attempt_number = tries
    return state


def measure(say: Say) -> dict[str, Any]:
    """Return the peak and the end of each case, and its arrivals in each second."""
    result: dict[str, Any] = {"installs": INSTALLS, "capacity": CAPACITY}
    result["retry_after_s"] = RETRY_AFTER.total_seconds()
    cases: dict[str, Any] = {}
    for name, spread, collector in (
        ("our offsets", SPREAD_SECONDS, Collector()),
        ("no offsets", 0, Collector()),
        ("our offsets, collector down until 02:45", SPREAD_SECONDS, _recovering()),
        ("no offsets, collector down until 02:45", 0, _recovering()),
    ):
        say(f"{INSTALLS:,} installs, {name}")
        simulate(collector, spread)
        last = max(collector.accepted)
        after = [n for second, n in collector.arrivals.items() if second >= collector.down_seconds]
        cases[name] = {
            "peak": max(collector.arrivals.values()),
            "peak_once_up": max(after),
            "requests": sum(collector.arrivals.values()),
            "accepted": sum(collector.accepted.values()),
            "last_after_up_s": last - collector.down_seconds,
            "arrivals": [collector.arrivals[second] for second in range(last + 1)],
        }
    return result | {"cases": cases}


def _recovering() -> Collector:
    return Collector(down_seconds=DOWN_SECONDS, capacity=CAPACITY)


def draw(result: dict[str, Any]) -> Figure:
    """Show the arrivals of each case over the minutes after 02:30."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    rows = figure.subplots(len(result["cases"]), 1, sharex=True)
    for axes, (name, case) in zip(rows, result["cases"].items(), strict=True):
        arrivals = [0, *case["arrivals"], 0]
        minutes = [(second - 1) / 60 for second in range(len(arrivals))]
        axes.step(minutes, arrivals, where="post", linewidth=0.8)
        axes.set(yscale="symlog", ylabel="a second", ylim=(0, None))
        axes.set_title(f"{name}: peak {case['peak']:,} a second", fontsize="small", loc="left")
    rows[-1].set_xlim(left=-1)  # all rows share it
    rows[-1].set_xlabel("minutes after 02:30")
    return figure
