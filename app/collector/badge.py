"""The badge: how many installs are active, as a picture and for shields.io. Pure."""

from dataclasses import dataclass
from typing import Any

from app.collector.daily import ACTIVE_2D
from app.collector.phrases import long_date, number
from app.collector.stats import Stats

LABEL = "active installs"
FRESH, GREY = "1f5fbf", "5a616b"
"""The colour of a number that is up to date, and of all else: white is legible on both."""
CACHE_SECONDS = 300
"""How long shields.io may show an answer; it takes no less."""

PADDING = 12
"""How much room there is around the label, and around the message."""

_NARROW, _WIDE = " ,.:;'|!()fijlrtI", "mwMW"


@dataclass(frozen=True)
class Badge:
    """What the badge says: ``title`` is all of it as a sentence."""

    message: str
    title: str
    color: str = GREY
    is_stale: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """How wide the label and the message are drawn, with the room around each."""
        return _width(LABEL) + PADDING, _width(self.message) + PADDING


def of(stats: Stats, *, counting_stopped: bool) -> Badge:
    """Return the badge of what is shown.

    If ``counting_stopped``, it names the day of its number.
    """
    if not stats.days:
        return Badge("no day counted yet", "No day has been counted yet.")
    last = stats.days[-1]
    active, day = number(last.movements[ACTIVE_2D]), long_date(last.day)
    title = f"Active installs at the end of {day}: {active}."
    if counting_stopped:
        return Badge(f"{active} on {day}", f"Counting stands still. {title}", is_stale=True)
    return Badge(active, title, FRESH)


def unavailable(why: str) -> Badge:
    """Return the badge where there is no number to show."""
    return Badge("not available", why)


def document(badge: Badge) -> dict[str, Any]:
    """Return what shields.io reads: see https://shields.io/badges/endpoint-badge."""
    return {
        "schemaVersion": 1,
        "label": LABEL,
        "message": badge.message,
        "color": badge.color,
        "isError": badge.is_stale,  # or a badge could give an old number another colour
        "cacheSeconds": CACHE_SECONDS,
    }


def _width(words: str) -> int:
    """Estimate how wide words are at 11 pixels; the picture fits them to it in any font."""
    return sum(4 if each in _NARROW else 11 if each in _WIDE else 7 for each in words)
