"""The badge: how many installs are active, as a picture and for shields.io. Pure."""

from dataclasses import dataclass
from typing import Any

from app.collector.daily import ACTIVE_2D
from app.collector.phrases import long_date, number
from app.collector.stats import Stats

LABEL = "active installs"
FRESH, GREY = "1f5fbf", "5a616b"
"""The colour of a current number, and of everything else: white is legible on both."""
CACHE_SECONDS = 300
"""How long shields.io may cache an answer; it accepts no shorter time."""

PADDING = 12
"""The pixels around the label, and around the message."""

_NARROW, _WIDE = " ,.:;'|!()fijlrtI", "mwMW"


@dataclass(frozen=True)
class Badge:
    """The text of the badge; ``title`` is all of it as a sentence."""

    message: str
    title: str
    color: str = GREY
    is_stale: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """The width of the label and of the message, with their padding."""
        return _width(LABEL) + PADDING, _width(self.message) + PADDING


def of(stats: Stats, *, counting_stopped: bool) -> Badge:
    """Return the badge of the last day.

    If ``counting_stopped``, it names the day of its number.
    """
    if not stats.days:
        return Badge("no day counted yet", "No day has been counted yet.")
    last = stats.days[-1]
    active, day = number(last.movements[ACTIVE_2D]), long_date(last.day)
    title = f"Active installs at the end of {day}: {active}."
    if counting_stopped:
        return Badge(f"{active} on {day}", f"Counting has stopped. {title}", is_stale=True)
    return Badge(active, title, FRESH)


def unavailable(why: str) -> Badge:
    """Return the badge for the case that there is no number to show."""
    return Badge("not available", why)


def document(badge: Badge) -> dict[str, Any]:
    """Return what shields.io reads: see https://shields.io/badges/endpoint-badge."""
    return {
        "schemaVersion": 1,
        "label": LABEL,
        "message": badge.message,
        "color": badge.color,
        "isError": badge.is_stale,  # without it, a badge could choose another colour
        "cacheSeconds": CACHE_SECONDS,
    }


def _width(words: str) -> int:
    """Estimate the width of words at 11 pixels; the picture stretches any font to it."""
    return sum(4 if each in _NARROW else 11 if each in _WIDE else 7 for each in words)
