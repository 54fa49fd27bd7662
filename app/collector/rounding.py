"""How a number of installs is shown without revealing a single install. Pure.

The number of all active installs is exact: 0 is shown as 0, and 1 to 4 are shown as “fewer than 5”.
Every other number, which is broken down, filtered or added up over days, is rounded to the nearest
multiple of ``ROUNDED_TO``. So two such numbers are equal or differ by at least that much. Below
``FOLD_BELOW`` a rounded number does not show whether it is zero: otherwise it could reveal one
install together with the exact number of all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.collector.daily import ABSENT, Counts
from app.collector.names import OTHER

FOLD_BELOW = 5
ROUNDED_TO = 5
FEW: Literal["fewer than 5"] = "fewer than 5"

Shown = int | None
"""A number of installs as it is shown; None for 1 to 4, and for 0 as well where it is rounded."""


def fold(installs: int) -> Shown:
    """Return a number of all installs as it is shown."""
    return None if 0 < installs < FOLD_BELOW else installs


def about(installs: int) -> Shown:
    """Return a number of some of the installs as it is shown: rounded, and None below 5."""
    return None if installs < FOLD_BELOW else _nearest(installs)


def _nearest(installs: int) -> int:
    return ROUNDED_TO * ((installs + ROUNDED_TO // 2) // ROUNDED_TO)


@dataclass(frozen=True)
class Group:
    """How many installs have a value."""

    value: str
    installs: int


@dataclass(frozen=True)
class Distribution:
    """The named groups, the largest first, and how many installs are in all others.

    ``reported_by`` is how many installs have a value at all. Each number is rounded by itself.
    """

    groups: list[Group]
    folded_installs: Shown
    reported_by: Shown

    @property
    def total(self) -> int:
        """The whole of which each number is a share; no share is more than 100 %."""
        together = sum(group.installs for group in self.groups) + (self.folded_installs or 0)
        return max(together, self.reported_by or 0)

    def in_order(self, key: Callable[[str], Any], *, reverse: bool = False) -> "Distribution":
        """Return the same with the groups in another order than by their size."""
        groups = sorted(self.groups, key=lambda group: key(group.value), reverse=reverse)
        return replace(self, groups=groups)


def distribute(counts: Counts) -> Distribution:
    """Name each group of at least ``FOLD_BELOW``, and add up all others."""
    reported = {value: installs for value, installs in counts.items() if value != ABSENT}
    named = {value: n for value, n in reported.items() if n >= FOLD_BELOW and value != OTHER}
    everyone = sum(reported.values())
    few = everyone - sum(named.values()) == FOLD_BELOW - 1
    if named and few and all(n - _nearest(n) == ROUNDED_TO // 2 for n in named.values()):
        # Each group is as large as its rounded number allows, which would reveal the others.
        del named[min(named, key=lambda value: (named[value], value))]
    groups = [Group(value, _nearest(installs)) for value, installs in named.items()]
    return Distribution(
        # Not by the exact numbers: that order would show which of two equal numbers is larger.
        groups=sorted(groups, key=lambda group: (-group.installs, group.value)),
        folded_installs=about(everyone - sum(named.values())),
        reported_by=about(everyone),
    )
