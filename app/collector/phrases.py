"""Numbers of installs, shares and dates as the page writes them. Pure."""

from datetime import UTC, date, datetime

from app.collector.rounding import FEW, Shown

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number(installs: Shown) -> str:
    """Return a number of installs for a cell or the middle of a sentence."""
    return FEW if installs is None else f"{installs:,}"


def spelled(count: int) -> str:
    """Return a number of other things than installs as a word."""
    return _WORDS[count] if count < len(_WORDS) else f"{count:,}"


def percent(part: float, whole: float) -> str:
    """Return a share in whole percents; 0% only for nothing, and 100% only for the whole."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 1:
        return "<1%"
    if 99 < share < 100:  # noqa: PLR2004 - percents
        return ">99%"
    return f"{share:.0f}%"


def signed(change: int, before: Shown) -> str:
    """Return a change with its sign: as a number and, if there were any before, in percents."""
    sign = "+" if change > 0 else MINUS
    words = f"{sign}{abs(change):,}"
    share = percent(abs(change), before) if before else ""
    if not share:
        return words
    return f"{words} ({share})" if share.startswith("<") else f"{words} ({sign}{share})"


def capital(sentence: str) -> str:
    """Return a sentence with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]


def listed(words: list[str]) -> str:
    """Return words as a list in a sentence."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def long_date(day: date) -> str:
    """Return a date as it is written in a sentence."""
    return f"{day_and_month(day)} {day.year}"


def day_and_month(day: date) -> str:
    """Return a date without its year."""
    return f"{day.day} {day:%B}"


def moment(at: datetime) -> str:
    """Return a time as it is written in a sentence."""
    at = at.astimezone(UTC)
    return f"{long_date(at)} at {at:%H:%M} UTC"
