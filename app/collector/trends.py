"""The sections on what changes over time: active installs, growth, versions, adoption. Pure.

Each function returns what one section of the page shows; ``stats`` has the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from itertools import pairwise

from app.collector import chart, tables
from app.collector.adoption import Adoption
from app.collector.chart import Axis, Chart, Series
from app.collector.daily import ACTIVE_2D, ACTIVE_7D, ACTIVE_30D, IN_USE
from app.collector.names import age
from app.collector.periods import LATER, Cohort, Growth, Period
from app.collector.phrases import (
    DASH,
    capital,
    day_and_month,
    long_date,
    number,
    percent,
    signed,
    spelled,
)
from app.collector.rounding import FEW, FOLD_BELOW, ROUNDED_TO, Distribution, Shown, about
from app.collector.stats import Before, DayOfStats, Stats

MOST = 90
"""The share of the active installs, in percent, that the answer must cover."""
FEWEST_FOR_A_SHARE = 50
"""Of fewer installs no share is shown, because each number may differ from the true one by 2."""
HALF = 50
"""The share of the active installs, in percent, that counts as adopted."""
TOO_FEW = "There are too few installs for this to be shown."
LINES = {ACTIVE_2D: "48 hours", ACTIVE_7D: "7 days", ACTIVE_30D: "30 days"}


@dataclass(frozen=True)
class Listing:
    """A table with the numbers of a chart, the latest line first."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    summary: str = ""
    """The text that opens it; empty if the table is always visible."""


@dataclass(frozen=True)
class Figure:
    """A number that answers a question, with its name."""

    name: str
    number: str
    note: str = ""
    trend: str = ""
    """``up``, ``down`` or empty."""


def headline(stats: Stats) -> str:
    """Say in one sentence how many are active, and how many more or fewer than a month before."""
    last = stats.days[-1]
    active, which = last.movements[ACTIVE_2D], _which(stats)
    if active == 0:
        installs = f"No install{which} was"
    elif active and which:
        installs = f"About {active:,} installs{which} were"
    else:
        installs = f"{capital(number(active))} installs{which} were"
    return f"{installs} active at the end of {long_date(last.day)}{_since_a_month(stats)}."


def _which(stats: Stats) -> str:
    version = f" of version {stats.version}" if stats.version else ""
    edition = f" in the {stats.edition} edition" if stats.edition else ""
    return f"{version}{edition}"


def _since_a_month(stats: Stats) -> str:
    before, change = stats.a_month_before, _clear_change(stats)
    if before is None or not change:
        return ""
    return f", {abs(change):,} {'more' if change > 0 else 'fewer'} than on {_day(before)}"


def _day(before: Before) -> str:
    return day_and_month(before.day)


def _clear_change(stats: Stats) -> int | None:
    """Return the change in a month; 0 if it is too small to show, or may be caused by rounding."""
    change, least = stats.change, FOLD_BELOW if _which(stats) == "" else ROUNDED_TO + 1
    return change if change is None or abs(change) >= least else 0


def figures(stats: Stats) -> list[Figure]:
    """Return the numbers at the top of the page."""
    last = stats.days[-1]
    found = [
        Figure("active", number(last.movements[ACTIVE_2D]), "reported within 48 hours"),
        _change(stats),
        _in_use(last),
    ]
    if stats.live:
        waiting = number(stats.live.not_established)
        note = "live: reported on too few days so far"
        found.append(Figure("not established yet", waiting, note))
    return found


def _change(stats: Stats) -> Figure:
    before, change, name = stats.a_month_before, _clear_change(stats), "in 30 days"
    if before is None:
        return Figure(name, DASH, "not counted 30 days before")
    was = f"{number(before.active)} on {_day(before)}"
    if change is None:
        return Figure(name, DASH, was)
    if change == 0:
        return Figure(name, "no clear change", was)
    return Figure(name, signed(change, before.active), was, "up" if change > 0 else "down")


def _in_use(day: DayOfStats) -> Figure:
    active, in_use = day.movements[ACTIVE_2D], day.movements[IN_USE]
    whole = about(active) if active else None
    if whole and in_use:
        share = percent(in_use, whole)
        return Figure("in use", share, "of the active installs report a consent")
    return Figure("in use", DASH, f"{FEW} report a consent")


def active(days: Sequence[DayOfStats]) -> tuple[Chart | None, Listing]:
    """Return the active installs of each day."""
    drawn = chart.lines(
        _by_day([each.day for each in days]),
        [
            _of_stock(words, f"m{n}", [each.movements[name] for each in days])
            for n, (name, words) in enumerate(LINES.items())
        ],
    )
    columns = {**LINES, IN_USE: "In use"}
    rows = [
        (
            f"{each.day}",
            [*(number(each.movements[name]) for name in columns), number(each.dev_builds)],
        )
        for each in reversed(days)
    ]
    return drawn, Listing(
        "Installs that reported within 48 hours, 7 days and 30 days, those in use, and"
        " development builds, by day",
        ["Day", *columns.values(), "Development builds"],
        rows,
        "Show the numbers by day",
    )


def _of_stock(name: str, mark: str, numbers: Sequence[Shown]) -> Series:
    return Series(name, mark, numbers, [number(each) for each in numbers])


def _by_day(days: Sequence[date]) -> Axis:
    """Return the days as an axis; its ticks name months, or some days if there are few months."""
    months = {
        n: _month(day)
        for n, (before, day) in enumerate(pairwise(days), 1)
        if before.month != day.month
    }
    names = [long_date(day) for day in days]
    if len(months) > 2:  # noqa: PLR2004 - three months name enough of the axis
        return Axis(names, months)
    return Axis(names, _some([f"{day.day} {day:%b}" for day in days]))


def _month(day: date) -> str:
    return f"{day:%b %Y}" if day.month == 1 else f"{day:%b}"


def _some(words: Sequence[str]) -> dict[int, str]:
    """Return about five words at equal distances, the last one included."""
    step = max(1, len(words) // 5)
    return {n: words[n] for n in sorted(range(len(words) - 1, -1, -step))}


def growth(stats: Stats) -> str:
    """Say whether there are more installs than a month before, and how many are new and lost."""
    came = _came_and_went(stats.growth) if stats.growth else ""
    return f"{_verdict(stats)} {came}".rstrip()


def _verdict(stats: Stats) -> str:
    before, now, change = stats.a_month_before, stats.days[-1].movements[ACTIVE_2D], stats.change
    if before is None:
        return "Not known yet: the first day was counted less than 30 days ago."
    if before.active is None and now is None:
        return TOO_FEW
    if change is None:
        more = "Yes" if before.active is None else "No"
        return f"{more}: from {number(before.active)} active installs to {number(now)} in 30 days."
    if not _clear_change(stats) or 100 * abs(change) < (before.active or 0):
        return f"No clear change: {number(now)} active, and {number(before.active)} 30 days before."
    grown = signed(change, before.active)
    return f"{'Yes' if change > 0 else 'No'}: {grown} active installs in 30 days."


def _came_and_went(growth: Growth) -> str:
    if not any(each.new or each.lost for each in growth.periods):
        return ""
    last = growth.periods[-1]
    return (
        f"{capital(_period(growth, last))}, {number(last.new)} were new, and {number(last.lost)}"
        " were lost."
    )


def _period(growth: Growth, period: Period) -> str:
    """Return a period as the beginning of a sentence."""
    match growth.by:
        case "day":
            return f"on {long_date(period.since)}"
        case "week":
            same = period.since.month == period.until.month
            since = f"{period.since.day}" if same else day_and_month(period.since)
            return f"in the week from {since} to {long_date(period.until)}"
        case "month":
            return f"in {period.since:%B %Y}"


def changes(growth: Growth) -> tuple[Chart | None, Listing]:
    """Return the new and the lost installs of each period."""
    periods = growth.periods
    names = [capital(_period(growth, each)) for each in periods]
    if growth.by == "month":
        axis = Axis(names, _some([_month(each.since) for each in periods]))
    else:
        axis = Axis(names, _by_day([each.since for each in periods]).ticks)
    drawn = chart.bars(
        axis,
        _of_stock("new", "up", [each.new for each in periods]),
        _of_stock("lost", "down", [each.lost for each in periods]),
    )
    rows = [
        (_cell(growth, each), [number(each.new), number(each.lost)]) for each in reversed(periods)
    ]
    caption = f"New installs, and installs lost after 30 days without a heartbeat, by {growth.by}"
    summary = f"Show the numbers by {growth.by}"
    return drawn, Listing(caption, [capital(growth.by), "New", "Lost"], rows, summary)


def _cell(growth: Growth, period: Period) -> str:
    return f"{period.since:%Y-%m}" if growth.by == "month" else f"{period.since}"


def retention(stats: Stats) -> tuple[str, Listing | None]:
    """Say how many installs of a month stay, and return the table of all months."""
    if stats.version:
        return "Installs move on to other versions: this is only shown for all versions.", None
    known = [each for each in stats.cohorts if each.established]
    after = {days: [each for each in known if str(days) in each.retained] for days in LATER}
    parts = [_stayed(months[-1], days) for days, months in after.items() if months]
    if not parts:
        return "No month with 5 or more new installs has been over for 30 days yet.", None
    rows = [
        (
            f"{each.month:%Y-%m}",
            [number(each.established), *(_kept(each, days, stats.until) for days in LATER)],
        )
        for each in reversed(stats.cohorts)
    ]
    columns = ["Established in", "Installs", *(f"Active after {days} days" for days in LATER)]
    caption = "Installs established in a month, and how many of them were active later"
    return f"{capital('; '.join(parts))}.", Listing(caption, columns, rows)


def _stayed(cohort: Cohort, days: int) -> str:
    of = f"of the {number(cohort.established)} installs established in {cohort.month:%B %Y}"
    retained = cohort.retained[str(days)]
    kept = number(retained) + (f" ({share})" if (share := _share_of(cohort, retained)) else "")
    return f"{of}, {kept} were active {days} days later"


def _share_of(cohort: Cohort, retained: Shown) -> str:
    """Return a share in words; nothing if there are so few that rounding would make it wrong."""
    whole = cohort.established or 0
    return percent(retained, whole) if retained and whole >= FEWEST_FOR_A_SHARE else ""


def _kept(cohort: Cohort, days: int, until: date | None) -> str:
    if str(days) in cohort.retained:
        retained = cohort.retained[str(days)]
        share = _share_of(cohort, retained)
        return f"{number(retained)}\N{NO-BREAK SPACE}({share})" if share else number(retained)
    ends = (cohort.month + timedelta(days=31)).replace(day=1) + timedelta(days=days - 1)
    return "not yet" if until and ends > until else "not counted"


def versions(stats: Stats) -> tuple[str, tables.Table]:
    """Say which version nearly all installs run or exceed, and return the table of all versions."""
    shown = stats.days[-1].by_version.in_order(key=age, reverse=True)
    released = dict(stats.releases)
    newer, rows = 0, tables.shares(shown, is_open=True)
    for n, group in enumerate(shown.groups):
        newer += group.installs
        day = released.get(group.value)
        note = f"{day:%Y-%m-%d}" if day else ""
        rows[n] = replace(rows[n], note=note, added_up=percent(newer, shown.total))
    answer, oldest = _support(shown)
    caption = "Active installs by version, the newest first"
    made = tables.table(caption, rows, names="Version", at_once=oldest)
    return answer, replace(made, added_up="Or newer")


def _support(shown: Distribution) -> tuple[str, str]:
    """Return the answer, and the newest version such that it and newer ones have ``MOST``.

    That is ``MOST`` of the installs whose version is named.
    """
    if not shown.groups:
        return TOO_FEW, ""
    named, newer = sum(group.installs for group in shown.groups), 0
    for group in shown.groups:
        newer += group.installs
        if newer * 100 >= MOST * named:
            break
    answer = f"{group.value} or newer: {percent(newer, shown.total)} of the active installs."
    if rest := shown.folded_installs:
        answer += f" The version of {percent(rest, shown.total)} is not shown."
    return answer, group.value


def adoption(found: Sequence[Adoption]) -> tuple[str, Chart | None, Listing | None]:
    """Say how fast releases are adopted, and return their shares by days since each came out."""
    if not found:
        return TOO_FEW, None, None
    shown = range(max(each.days[-1].after for each in found) + 1)
    series = [_of_release(each, n) for n, each in enumerate(found)]
    step = next((step for step in _STEPS if len(shown) <= chart.TICKS * step), _STEPS[-1])
    axis = Axis(
        ["On the day of the release", *(f"{_days_after(n)} after" for n in shown[1:])],
        {n: _days_after(n) if n else "release" for n in shown if n % step == 0},
    )
    rows = [
        (
            _days_after(n),
            [each.words[n] if n < len(each.words) else DASH for each in series],
        )
        for n in shown
    ]
    columns = ["After", *(f"{each.version} or newer" for each in found)]
    listing = Listing(
        "Share of the active installs that ran a release or a newer one, by days since it came out",
        columns,
        rows,
        "Show the numbers by days since the release",
    )
    return _speed(found), chart.lines(axis, series, unit="%"), listing


_STEPS = (1, 2, 5, 10, 15, 30)


def _days_after(count: int) -> str:
    return f"{count} day{'' if count == 1 else 's'}"


def _of_release(adoption: Adoption, n: int) -> Series:
    """Return its share by days, up to the last one that is known."""
    known = {each.after: each for each in adoption.days}
    days = [known.get(after) for after in range(adoption.days[-1].after + 1)]
    return Series(
        f"{adoption.version} or newer",
        f"m{n}",
        [round(100 * day.installs / day.of, 2) if day else None for day in days],
        [percent(day.installs, day.of) if day else DASH for day in days],
    )


def _speed(found: Sequence[Adoption]) -> str:
    newest = found[0]
    last = newest.days[-1]
    share = percent(last.installs, last.of)
    after = f"{_days(last.after)} after its release" if last.after else "on the day of its release"
    parts = [f"{newest.version} or newer ran on {share} of the active installs {after}."]
    for each in found:
        half = next((day for day in each.days if 100 * day.installs >= HALF * day.of), None)
        if half and half is not each.days[0]:
            parts.append(f"{each.version} or newer ran on half of them after {_days(half.after)}.")
            break
    return " ".join(parts)


def _days(count: int) -> str:
    return f"{spelled(count)} day{'' if count == 1 else 's'}"
