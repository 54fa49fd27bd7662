"""The words of the page: each question, its answer, its chart and its tables. Pure.

Every sentence, share and mark is made from the rounded numbers of ``stats``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from app.collector import events, tables, trends
from app.collector.chart import Chart
from app.collector.daily import ACTIVE_2D, ACTIVE_30D
from app.collector.events import Event
from app.collector.names import age
from app.collector.phrases import (
    capital,
    day_and_month,
    listed,
    long_date,
    moment,
    number,
    percent,
    spelled,
)
from app.collector.recount import Progress
from app.collector.rounding import fold
from app.collector.stats import UNUSED, LiveStats, Recount, Stats
from app.collector.tables import LABELS, Table
from app.collector.trends import TOO_FEW, Figure, Listing

RANGES = (30, 90, 365)
EVENTS = 5
"""The page shows at most so many events; the feed has more."""

_MOSTLY = {
    "deployment": "deployed as {} ({})",
    "platform": "on {} ({})",
    "edition": "in the {} edition ({})",
}


@dataclass(frozen=True)
class Question:
    """A section of the page: a question and its answer."""

    name: str
    title: str
    answer: str
    figures: Sequence[Figure] = ()
    chart: Chart | None = None
    chart_note: str = ""
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()
    listing: Listing | None = None
    """The same numbers as those of the chart, or those of a section without one."""


@dataclass(frozen=True)
class View:
    """The values for the template."""

    headline: str
    filtered: str
    warnings: list[str]
    """What a reader must know before the numbers."""
    few: bool
    """Whether so few installs are active that only the days are shown."""
    versions: list[str]
    """The versions to choose from, and the chosen one."""
    editions: list[str]
    cells: list[list[Question]]
    """The questions in their order; those of one column are in one list."""
    events: list[Event]
    """The last events, the newest first."""
    live: str
    state: Literal["no install", "no day", "too few", "numbers"]
    established: str
    """After what an install counts, as the end of a sentence."""


def of(stats: Stats, *, counting_stopped: bool, established_days: int) -> View:
    """Return the page of what is shown.

    If ``counting_stopped``, the last days are missing. An install is established after heartbeats
    on ``established_days`` different days.
    """
    state = _state(stats)
    return View(
        headline=trends.headline(stats) if state == "numbers" else "",
        filtered=_filtered(stats),
        warnings=_warnings(stats, counting_stopped=counting_stopped),
        few=state == "numbers" and not stats.days[-1].movements[ACTIVE_2D],
        versions=_choices(stats.all_versions, stats.version, age)[::-1],
        editions=_choices(stats.all_editions, stats.edition, str),
        cells=_cells(stats) if state == "numbers" else [],
        events=_events(stats, counting_stopped=counting_stopped) if state == "numbers" else [],
        live=_live(stats.live) if stats.live else "",
        state=state,
        established=_established(established_days),
    )


def _state(stats: Stats) -> Literal["no install", "no day", "too few", "numbers"]:
    if stats.version or stats.edition:
        return "no day" if stats.as_of is None else "numbers" if stats.days else "too few"
    if stats.days and not _is_zero(stats):
        return "numbers"
    live = stats.live
    if stats.recount or (live and (live.active != 0 or live.not_established != 0)):
        return "numbers" if stats.days else "no day"
    return "no install"


def _is_zero(stats: Stats) -> bool:
    """Return whether no chosen day has an install, not even a lost one."""
    counted = (each.movements[ACTIVE_30D] == each.dev_builds == 0 for each in stats.days)
    periods = stats.growth.periods if stats.growth else ()
    return all(counted) and not any(each.new or each.lost for each in periods)


def _warnings(stats: Stats, *, counting_stopped: bool) -> list[str]:
    found = []
    if stats.standby_as_of:
        found.append(_behind(stats.standby_as_of))
    if stats.until and counting_stopped:
        where = " in this copy" if stats.standby_as_of else ""
        found.append(
            f"Counting has stopped{where}: the last day that was counted is"
            f" {long_date(stats.until)}. The numbers below are those of that day."
        )
    if stats.recount:
        found.append(_recounting(stats.recount))
    return found


def _behind(as_of: datetime) -> str:
    return (
        "This page is read from a copy of the database that is behind: all numbers are as of"
        f" {moment(as_of)}."
    )


def _recounting(recount: Recount) -> str:
    progress = Progress(recount.since, recount.replayed, recount.until)
    days = f"{day_and_month(recount.since)} to {long_date(recount.until)}"
    return (
        f"Earlier days are being counted again: {int(100 * progress.share)}% done. Until that is"
        f" finished, some numbers of {days} are missing or old."
    )


def _live(live: LiveStats) -> str:
    active = "no install is" if live.active == 0 else f"{number(live.active)} installs are"
    return (
        f"Live, on {moment(live.as_of)}: {active} active, and {number(live.not_established)} more"
        " are not established yet."
    )


def _established(days: int) -> str:
    if days <= 1:
        return "after its first heartbeat"
    return f"after heartbeats on {spelled(days)} different days"


def requests(ended: Mapping[str, int] | None) -> str:
    """Return the outcomes of yesterday's requests to store a heartbeat, in words."""
    if ended is None:
        return "The outcomes of yesterday's requests to store a heartbeat are not known yet."
    if not ended:
        return "Yesterday no heartbeat was sent to this collector."
    parts = (f"{number(fold(n))} {outcome}" for outcome, n in sorted(ended.items()))
    return f"Requests to store a heartbeat, yesterday: {', '.join(parts)}."


def _choices(known: Sequence[str], chosen: str | None, key: Callable[[str], Any]) -> list[str]:
    return sorted({*known, *([chosen] if chosen else [])}, key=key)


def _filtered(stats: Stats) -> str:
    edition = f" in the {stats.edition} edition" if stats.edition else ""
    what = (
        f"installs of version {stats.version}{edition}" if stats.version else f"installs{edition}"
    )
    those = f"Only {what}" if stats.version or stats.edition else "All installs"
    if stats.since is None or stats.until is None:
        return f"{those}."
    return f"{those}, from {long_date(stats.since)} to {long_date(stats.until)}."


def _events(stats: Stats, *, counting_stopped: bool) -> list[Event]:
    """Return the last events; with a filter, no event, since each is about all installs."""
    if stats.version or stats.edition:
        return []
    return events.of(stats, counting_stopped=counting_stopped)[:EVENTS]


def _cells(stats: Stats) -> list[list[Question]]:
    """Return the questions in their order; those of one list share a column on a wide screen."""
    cells = [[_active(stats)], _growth(stats)]
    if stats.days[-1].movements[ACTIVE_2D]:  # or too few installs are active for anything else
        cells += [
            [_versions(stats), _adoption(stats)],
            [_where(stats), _runtimes(stats)],
            [_sizes(stats), _features(stats)],
        ]
    return [cell for cell in cells if cell]


def _active(stats: Stats) -> Question:
    drawn, listing = trends.active(stats.days)
    return Question(
        "active",
        "Is anyone running this?",
        trends.headline(stats),
        trends.figures(stats),
        chart=drawn,
        listing=listing,
    )


def _growth(stats: Stats) -> list[Question]:
    if stats.growth is None:
        return []
    drawn, listing = trends.changes(stats.growth)
    stay, of_months = trends.retention(stats)
    return [
        Question(
            "growth",
            "Is it growing?",
            trends.growth(stats),
            chart=drawn,
            chart_note="Grey marks are numbers below 5." if drawn and drawn.has_few else "",
            listing=listing if stats.growth.periods else None,
        ),
        Question("retention", "Do they stay?", stay, listing=of_months),
    ]


def _of_one(version: str) -> str:
    return f"All of these run {version}: the page is filtered by that version."


def _versions(stats: Stats) -> Question:
    title = "Which versions must we support?"
    if stats.version:
        return Question("versions", title, _of_one(stats.version))
    answer, table = trends.versions(stats)
    return Question("versions", title, answer, tables=[table])


def _adoption(stats: Stats) -> Question:
    title = "How fast is a release adopted?"
    if stats.version:
        return Question("adoption", title, _of_one(stats.version))
    answer, drawn, listing = trends.adoption(stats.adoption)
    return Question("adoption", title, answer, chart=drawn, listing=listing)


def _where(stats: Stats) -> Question:
    asked = [
        name for name in (*tables.WHERE, *tables.OTHERS) if name != "edition" or not stats.edition
    ]
    parts = [
        words.format(*leader)
        for name, words in _MOSTLY.items()
        if name in asked and (leader := tables.leader(stats.values[name]))
    ]
    answer = f"Most often {', '.join(parts)}." if parts else TOO_FEW
    shown = [tables.of_field(name, stats) for name in asked]
    return Question("where", "Where does it run?", answer, tables=shown)


def _runtimes(stats: Stats) -> Question:
    parts = []
    for name in tables.RUNTIMES:
        shown = stats.values[name].in_order(key=tables.age_of_runtime)
        if oldest := tables.leader(shown):
            version, share = oldest
            parts.append(
                f"the oldest {LABELS[name]} shown is {version}, on {share} of the active installs"
            )
    answer = f"{capital('; '.join(parts))}." if parts else TOO_FEW
    return Question(
        "runtimes",
        "Which Python and Postgres must we support?",
        answer,
        tables=[tables.of_field(name, stats) for name in tables.RUNTIMES],
    )


def _sizes(stats: Stats) -> Question:
    parts = [
        f"{tables.bucket(leader[0])} {LABELS[name].lower()} ({leader[1]})"
        for name in ("counts.sites", "counts.users")
        if (leader := tables.leader(stats.values[name]))
    ]
    answer = f"Most common are {listed(parts)}." if parts else TOO_FEW
    shown = [tables.of_field(name, stats) for name in tables.SIZES]
    return Question("sizes", "How big are installs?", answer, tables=shown)


def _features(stats: Stats) -> Question:
    share = {
        name: feature.installs / feature.of
        for name, feature in stats.features.items()
        if feature.installs and feature.of
    }
    in_order = sorted(UNUSED, key=lambda name: (-share.get(name, 0), name))
    everyone = stats.values["edition"].reported_by
    rows = [
        tables.row(
            f"{LABELS[name]}{tables.base(stats.features[name].of, everyone)}",
            stats.features[name].installs,
            stats.features[name].of or 0,
        )
        for name in in_order
    ]
    details = [
        tables.of_field(name, stats, ": on how many sites")
        for name in UNUSED
        if name in stats.values
    ]
    return Question(
        "features",
        "Which features are used?",
        _most_and_least(in_order, share),
        tables=[tables.table("Active installs that use a feature", rows, names="Feature")],
        details=details,
    )


def _most_and_least(in_order: Sequence[str], share: Mapping[str, float]) -> str:
    shown = [name for name in in_order if name in share]
    if not shown:
        return TOO_FEW
    answer = f"Most used is “{LABELS[shown[0]]}” ({percent(share[shown[0]], 1)})"
    few = len(in_order) - len(shown)
    if few:
        features = "feature is" if few == 1 else "features are"
        return f"{answer}; {spelled(few)} {features} used by fewer than 5 each."
    return f"{answer}, and least “{LABELS[shown[-1]]}” ({percent(share[shown[-1]], 1)})."
