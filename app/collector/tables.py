"""Tables of what installs report: a bar for each value, and one for all others. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from app.collector.daily import VALUES
from app.collector.names import OPEN
from app.collector.phrases import DASH, number, percent
from app.collector.rounding import FEW, Distribution, Shown
from app.collector.stats import UNUSED, Stats
from app.payload import Bucket, all_fields

BUCKETS = get_args(Bucket)
AT_ONCE = 10
"""A table shows so many lines until the reader opens the rest."""

LABELS = {
    "version": "Version",
    "edition": "Edition",
    "deployment": "Deployment",
    "platform": "Platform",
    "python_version": "Python",
    "stack.postgres_version": "Postgres",
    "counts.orgs": "Organisations",
    "counts.sites": "Sites",
    "counts.users": "Users",
    "counts.scans_last_24h": "Scans in 24 hours",
    "counts.consents_last_24h": "Consents in 24 hours",
    "features.tcf_v22_sites": "TCF 2.2",
    "features.auto_blocking_sites": "Blocks until opt-in",
    "features.scanner_scheduled_sites": "Scheduled scans",
    "features.geoip_header_configured": "GeoIP by header",
    "features.geoip_maxmind_configured": "GeoIP by MaxMind",
    "features.rate_limit_enabled": "Rate limit",
    "features.compliance_ee": "Enterprise compliance",
}
"""What the page calls each field that is counted."""

RUNTIMES = ("python_version", "stack.postgres_version")
SIZES = tuple(name for name in VALUES if name.startswith("counts."))
WHERE = ("deployment", "platform", "edition")
OTHERS = tuple(name for name in VALUES if name not in {*WHERE, *RUNTIMES, *SIZES, *UNUSED})
"""The fields without a section of their own."""

_FORMS: dict[str, object] = {name: field.annotation for name, field in all_fields().items()}


@dataclass(frozen=True)
class Row:
    """A line of a table: its name, how many installs, and their share in percent."""

    name: str
    installs: str
    width: float
    share: str
    rest: bool = False
    note: str = ""
    """A note next to the name."""
    added_up: str = ""
    """The share of this line and all lines before it."""


@dataclass(frozen=True)
class Table:
    """A distribution as a table with bars."""

    caption: str
    rows: Sequence[Row]
    """The lines that are always visible: those of the first values, and that of all others."""
    hidden: Sequence[Row] = ()
    """The lines that a reader can open."""
    names: str = "Value"
    """The title of the column with the names."""
    added_up: str = ""
    """The title of the column that adds up the shares; empty without that column."""


def table(caption: str, rows: Sequence[Row], *, names: str = "Value", at_once: str = "") -> Table:
    """Return a table of rows, of which the first ``AT_ONCE`` are always visible.

    The row with the name ``at_once`` is always visible, at any place.
    """
    shown = [row for n, row in enumerate(rows) if n < AT_ONCE or row.rest or row.name == at_once]
    return Table(caption, shown, [row for row in rows if row not in shown], names)


def of_field(name: str, stats: Stats, more: str = "") -> Table:
    """Return the table of a field: its values in their natural order, if they have one."""
    shown, form = stats.values[name], _FORMS[name]
    # Of a feature only its users are counted; the section on features shows how many report it.
    of = "" if name in UNUSED else base(shown.reported_by, stats.values["edition"].reported_by)
    caption = f"{LABELS[name]}{more}{of}"
    if form is Bucket:
        return table(caption, shares(shown.in_order(key=BUCKETS.index), bucket))
    if name in RUNTIMES:
        label = f"{LABELS[name]} {{}}".format
        in_order = shown.in_order(key=age_of_runtime, reverse=True)
        return table(caption, shares(in_order, label, is_open=True))
    return table(caption, shares(shown, is_open=name in OPEN))


def age_of_runtime(version: str) -> tuple[int, ...]:
    """Return what orders the versions of Python, or of Postgres, by their age."""
    return tuple(map(int, version.split(".")))


def base(reported_by: Shown, everyone: Shown) -> str:
    """Say how many installs report a field, if not all: older schemas may lack it."""
    if reported_by == everyone:
        return ""
    return f" (of {number(reported_by)} installs that report it)"


def shares(
    shown: Distribution, name: Callable[[str], str] = str, *, is_open: bool = False
) -> list[Row]:
    """Return a line for each group, in the given order, and one for all others."""
    rows = [row(name(group.value), group.installs, shown.total) for group in shown.groups]
    if shown.folded_installs or not rows:
        name_of_rest = f"other (not listed, or {FEW})" if is_open else "all others"
        rows.append(row(name_of_rest, shown.folded_installs, shown.total, is_rest=True))
    return rows


def row(name: str, installs: Shown, total: int, *, is_rest: bool = False) -> Row:
    """Return a line: the width of its bar is its share, in percent."""
    if installs is None:
        return Row(name, FEW, 0, "", is_rest)
    width = round(100 * installs / total, 1) if total else 0.0
    return Row(name, number(installs), width, percent(installs, total), is_rest)


def bucket(name: str) -> str:
    """Return the name of a range of sizes."""
    return name.replace("-", DASH)


def leader(shown: Distribution) -> tuple[str, str] | None:
    """Return the commonest value and its share in words; None if no value is named."""
    if not shown.groups:
        return None
    return shown.groups[0].value, percent(shown.groups[0].installs, shown.total)
