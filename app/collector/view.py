"""The page in words: each question, its answer in a sentence, and what is drawn and listed. Pure.

Every sentence, share and mark is made from the numbers of ``stats`` as they are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, get_args

from app.collector import chart
from app.collector.daily import (
    ACTIVE_2D,
    ACTIVE_7D,
    ACTIVE_30D,
    IN_USE,
    LOST,
    NEW,
    RETAINED,
    VALUES,
)
from app.collector.names import OPEN
from app.collector.recount import Progress
from app.collector.stats import (
    FEW,
    FOLD_BELOW,
    UNUSED,
    DayOfStats,
    Distribution,
    LiveStats,
    Recount,
    Stats,
    Told,
    about,
    fold,
)
from app.payload import Bucket, all_fields

RANGES = (30, 90, 365)
LINES = 5
"""So many versions have a line of their own."""
MONTH = 30
BUCKETS = get_args(Bucket)
MOST = 90
"""The share, in percent, of the installs that is worth supporting for sure."""

STAGES = ("dev", "alpha", "beta", "rc", "")
VERSIONS = "Which versions must we support?"
ADOPTION = "How fast is a release adopted?"
DASH = "\N{EN DASH}"
NONE_TOLD = "There are too few installs for this to be shown."

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
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

_MOSTLY = {
    "deployment": "deployed as {} ({})",
    "platform": "on {} ({})",
    "edition": "in the {} edition ({})",
}
_RUNTIMES = ("python_version", "stack.postgres_version")
_SIZES = tuple(name for name in VALUES if name.startswith("counts."))
_ELSEWHERE = {*_MOSTLY, *_RUNTIMES, *_SIZES, *UNUSED}
_WHERE = (*_MOSTLY, *(name for name in VALUES if name not in _ELSEWHERE))
"""What is shown under *Where does it run?*: all that has no section of its own."""
_FORMS: dict[str, object] = {name: field.annotation for name, field in all_fields().items()}
_YES_OR_NO = {"true": "yes", "false": "no"}


@dataclass(frozen=True)
class Row:
    """A line of a table: its name, how many installs, and their share in percent."""

    name: str
    installs: str
    width: float
    share: str
    cumulative: str = ""
    rest: bool = False


@dataclass(frozen=True)
class Table:
    """A distribution as a table with bars."""

    caption: str
    rows: list[Row]


@dataclass(frozen=True)
class ByDay:
    """A chart over the days, and the table of the same numbers, the latest day first."""

    name: str
    chart: chart.Chart
    columns: list[str]
    days: list[tuple[date, list[str]]]


@dataclass(frozen=True)
class Question:
    """What a section answers."""

    name: str
    title: str
    answer: str
    notes: Sequence[str] = ()
    by_day: ByDay | None = None
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()


@dataclass(frozen=True)
class View:
    """What the template is filled in with."""

    filtered: str
    warnings: list[str]
    """What a reader has to know before the numbers."""
    few: bool
    """Whether so few are active that only the days are shown."""
    versions: list[str]
    """What can be chosen, and what was."""
    editions: list[str]
    heard_of: list[tuple[str, str]]
    questions: list[Question]
    live: str
    state: Literal["no install", "no day", "too few", "numbers"]
    established: str
    """When an install counts, as the end of a sentence."""


def of(stats: Stats, *, stands_still: bool, established_days: int) -> View:
    """Return the page of what is shown.

    Where counting ``stands_still``, a day is missing at its end. An install is established that was
    heard of on ``established_days`` days.
    """
    told = bool(stats.days)
    state = _state(stats)
    return View(
        filtered=_filtered(stats),
        warnings=_warnings(stats, stands_still=stands_still),
        few=told and not stats.days[-1].movements[ACTIVE_2D],
        versions=_choices(stats.all_versions, stats.version, _age)[::-1],
        editions=_choices(stats.all_editions, stats.edition, str),
        heard_of=_heard_of(stats.days[-1]) if told else [],
        questions=_questions(stats) if state == "numbers" else [],
        live=_live(stats.live) if stats.live else "",
        state=state,
        established=_established(established_days),
    )


def _state(stats: Stats) -> Literal["no install", "no day", "too few", "numbers"]:
    if stats.version or stats.edition:
        return "no day" if stats.as_of is None else "numbers" if stats.days else "too few"
    live, days = stats.live, stats.days
    counted = ((*map(each.movements.get, (ACTIVE_30D, LOST)), each.dev_builds) for each in days)
    if not any(number != 0 for numbers in counted for number in numbers):
        is_live = live is not None and (live.active != 0 or live.not_established != 0)
        if not is_live and not stats.recount:
            return "no install"
    return "numbers" if days else "no day"


def _warnings(stats: Stats, *, stands_still: bool) -> list[str]:
    found = []
    if stats.standby_as_of:
        found.append(_behind(stats.standby_as_of))
    if stats.until and stands_still:
        where = " in this copy" if stats.standby_as_of else ""
        found.append(
            f"Counting stands still{where}: the last day that was counted is"
            f" {long_date(stats.until)}. The numbers below are those of that day."
        )
    if stats.recount:
        found.append(_recounting(stats.recount))
    return found


def _behind(as_of: datetime) -> str:
    moment = as_of.astimezone(UTC)
    return (
        "This page is read from a copy of the database that is behind: all numbers are as of"
        f" {moment:%H:%M} UTC on {long_date(moment)}, and nothing later is in them."
    )


def _recounting(recount: Recount) -> str:
    progress = Progress(recount.since, recount.replayed, recount.until)
    days = f"{_day_month(recount.since)} to {long_date(recount.until)}"
    return (
        f"Earlier days are being counted again: {int(100 * progress.share)}% done; until then the"
        f" numbers of {days} are in part missing or those of the former count."
    )


def _live(live: LiveStats) -> str:
    moment = live.as_of.astimezone(UTC)
    return (
        f"On {_day_month(moment)} at {moment:%H:%M} UTC, {_installs(live.active)} active:"
        f" heard of within the 48 hours before. Not established yet: {number(live.not_established)}"
        " more."
    )


def _established(days: int) -> str:
    if days <= 1:
        return "as soon as it is heard of"
    return f"when it has been heard of on {spelled(days)} different days"


def requests(ended: Mapping[str, int] | None) -> str:
    """Return how the requests to keep a heartbeat ended on the day before, in words."""
    if ended is None:
        return "How yesterday's requests to keep a heartbeat ended is not known yet."
    if not ended:
        return "Yesterday no heartbeat was sent to this collector."
    parts = (f"{number(fold(n))} {outcome}" for outcome, n in sorted(ended.items()))
    return f"Requests to keep a heartbeat, yesterday: {', '.join(parts)}."


def _choices(told: Sequence[str], chosen: str | None, key: Callable[[str], Any]) -> list[str]:
    return sorted({*told, *([chosen] if chosen else [])}, key=key)


def _filtered(stats: Stats) -> str:
    edition = f" in the {stats.edition} edition" if stats.edition else ""
    what = (
        f"installs of version {stats.version}{edition}" if stats.version else f"installs{edition}"
    )
    those = f"Only {what}" if stats.version or stats.edition else "All installs"
    if stats.since is None or stats.until is None:
        return f"{those}."
    return f"{those}, from {long_date(stats.since)} to {long_date(stats.until)}."


def _heard_of(day: DayOfStats) -> list[tuple[str, str]]:
    spans = {ACTIVE_2D: "48 hours", ACTIVE_7D: "7 days", ACTIVE_30D: "30 days"}
    return [(number(day.movements[name]), words) for name, words in spans.items()]


def long_date(day: date) -> str:
    """Return a date as it is written in a sentence."""
    return f"{_day_month(day)} {day.year}"


def _day_month(day: date) -> str:
    return f"{day.day} {day:%B}"


def number(installs: Told) -> str:
    """Return a number of installs for a cell or the middle of a sentence."""
    return FEW if installs is None else f"{installs:,}"


def spelled(count: int) -> str:
    """Return a number of things that are no installs as a word."""
    return _WORDS[count] if count < len(_WORDS) else f"{count:,}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _installs(installs: Told) -> str:
    return "no install was" if installs == 0 else f"{number(installs)} installs were"


def _had(installs: Told) -> str:
    return "no install had" if installs == 0 else f"{number(installs)} installs had"


def percent(part: float, whole: float) -> str:
    """Return a share in whole percents, of which neither 0 nor 100 is said unless it is so."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 1:
        return "<1%"
    if 99 < share < 100:  # noqa: PLR2004 - percents
        return ">99%"
    return f"{share:.0f}%"


def _questions(stats: Stats) -> list[Question]:
    over_time = [_active(stats.days), _growth(stats)]
    if not stats.days[-1].movements[ACTIVE_2D]:
        return over_time  # of so few active installs nothing else is shown
    of_one = f"All of these run {stats.version}: that is what the page is filtered by."
    return [
        *over_time,
        Question("versions", VERSIONS, of_one) if stats.version else _versions(stats.days[-1]),
        Question("adoption", ADOPTION, of_one) if stats.version else _adoption(stats.days),
        _where(stats),
        _runtimes(stats),
        _sizes(stats),
        _features(stats),
    ]


def _by_day(
    name: str,
    drawn: chart.Chart,
    days: Sequence[DayOfStats],
    columns: dict[str, Callable[[DayOfStats], str]],
) -> ByDay:
    rows = [(each.day, [read(each) for read in columns.values()]) for each in days]
    return ByDay(name, drawn, [*columns], rows[::-1])


def _moved(name: str) -> Callable[[DayOfStats], str]:
    return lambda day: number(day.movements[name])


def _active(days: Sequence[DayOfStats]) -> Question:
    last = days[-1]
    answer = (
        f"At the end of {long_date(last.day)}, {_had(last.movements[ACTIVE_2D])} been heard of"
        " within 48 hours"
    )
    if len(days) > MONTH:
        then = days[-1 - MONTH].movements[ACTIVE_2D]
        answer += f"; 30 days before it was {'none' if then == 0 else number(then)}"
    columns = {"48 hours": ACTIVE_2D, "7 days": ACTIVE_7D, "30 days": ACTIVE_30D}
    drawn = chart.lines(
        [each.day for each in days],
        [
            chart.Series(words, f"m{n}", [each.movements[name] for each in days])
            for n, (words, name) in enumerate(columns.items())
        ],
    )
    columns["In use"] = IN_USE
    by_day = _by_day(
        "Installs heard of within 48 hours, 7 days and 30 days, and those in use, by day",
        drawn,
        days,
        {words: _moved(name) for words, name in columns.items()},
    )
    notes = [_in_use(last), f"Development builds, counted apart: {number(last.dev_builds)}."]
    return Question("active", "Is anyone running this?", f"{answer}.", notes, by_day)


def _in_use(day: DayOfStats) -> str:
    active, in_use = day.movements[ACTIVE_2D], day.movements[IN_USE]
    whole = about(active) if active else None
    share = f" ({percent(in_use, whole)} of the active ones)" if whole and in_use else ""
    return f"In use, with a consent in their last 24 hours: {number(in_use)}{share}."


def _growth(stats: Stats) -> Question:
    days = stats.days
    first, last = days[0], days[-1]
    total = _in_all if stats.version is None and stats.edition is None else _about_in_all
    new, lost = ([each.movements[name] for each in days] for name in (NEW, LOST))
    was, now = (number(day.movements[ACTIVE_30D]) for day in (first, last))
    answer = (
        f"At the end of {long_date(first.day)}, {was} installs had been heard of within 30 days,"
        f" and {now} at the end of {long_date(last.day)}. On these days {total(new)} were new,"
        f" and {total(lost)} fell silent."
    )
    if first is last:
        answer = f"The first day that was counted is {long_date(first.day)}: {total(new)} were new."
    drawn = chart.bars(
        [each.day for each in days],
        chart.Series("new", "up", new),
        chart.Series("lost", "down", lost),
    )
    by_day = _by_day(
        "New installs, installs lost after 30 days of silence, and those retained, by day",
        drawn,
        days,
        {"New": _moved(NEW), "Lost": _moved(LOST), "Retained": _moved(RETAINED)},
    )
    return Question("growth", "Is it growing?", answer, [_retained(last)], by_day)


def _retained(day: DayOfStats) -> str:
    then = long_date(day.day - timedelta(days=MONTH))
    return (
        f"Retained, which are those established on {then} that were still active 30 days later:"
        f" {number(day.movements[RETAINED])}."
    )


def _in_all(numbers: Sequence[Told]) -> str:
    """Return a sum, by what is told of its parts: a few are at least one."""
    exact, few = sum(n for n in numbers if n), numbers.count(None)
    low, high = exact + few, exact + few * (FOLD_BELOW - 1)
    if not few:
        return number(exact) if exact else "none"
    if high < FOLD_BELOW:
        return FEW
    return f"at most {high:,}" if low < FOLD_BELOW else f"{low:,} to {high:,}"


def _about_in_all(numbers: Sequence[Told]) -> str:
    """Return a sum of rounded numbers, of which the few have no number."""
    shown = sum(n for n in numbers if n)
    if None not in numbers:
        return f"about {shown:,}" if shown else "none"
    return f"about {shown:,} (without days with {FEW})" if shown else f"{FEW} a day"


def _shares(
    told: Distribution,
    name: Callable[[str], str] = str,
    *,
    is_open: bool = False,
    add_up: bool = False,
) -> list[Row]:
    """Return a line for each group in the order that they have, and one for the rest."""
    total, so_far, rows = told.total, 0, []
    for group in told.groups:
        so_far += group.installs
        rows.append(
            _row(name(group.value), group.installs, total, percent(so_far, total) if add_up else "")
        )
    if told.folded_installs or not rows:
        together = f"other (not listed, or {FEW})" if is_open else "others together"
        rows.append(_row(together, told.folded_installs, total, is_rest=True))
    return rows


def _row(
    name: str, installs: Told, total: int, cumulative: str = "", *, is_rest: bool = False
) -> Row:
    if installs is None:
        return Row(name, FEW, 0, "", cumulative, is_rest)
    width = round(100 * installs / total, 1) if total else 0.0
    return Row(name, number(installs), width, percent(installs, total), cumulative, is_rest)


def _versions(day: DayOfStats) -> Question:
    told = day.by_version
    table = Table("Active installs by version", _shares(told, is_open=True, add_up=True))
    return Question("versions", VERSIONS, _support(told), tables=[table])


def _support(told: Distribution) -> str:
    if not told.groups:
        return NONE_TOLD
    first, covered, count = told.groups[0], 0, 0
    for count, group in enumerate(told.groups, 1):  # noqa: B007 - the last one is what is asked for
        covered += group.installs
        if covered * 100 >= MOST * told.total:
            break
    share = percent(covered, told.total)
    if count == 1:
        return f"{first.value} alone is on {share} of the active installs."
    return (
        f"The {spelled(count)} commonest are on {share} of the active installs;"
        f" {first.value} leads with {percent(first.installs, told.total)}."
    )


def _adoption(days: Sequence[DayOfStats]) -> Question:
    told = days[-1].by_version
    newest = max((group.value for group in told.groups), key=_age, default=None)
    if newest is None:
        return Question("adoption", ADOPTION, NONE_TOLD)
    largest = [group.value for group in told.groups if group.value != newest][: LINES - 1]
    versions = sorted([newest, *largest], key=_age, reverse=True)
    begins = next(n for n, day in enumerate(days) if day.versions.keys() & {*versions})
    days = days[max(0, begins - 1) :]

    def others(day: DayOfStats) -> Told:
        rest = sum(n for name, n in day.versions.items() if name not in versions)
        return rest + (day.other_versions or 0) if rest else day.other_versions

    series = [
        chart.Series(name, f"m{n}", [_share(day, day.versions.get(name)) for day in days])
        for n, name in enumerate(versions)
    ]
    rest = chart.Series("others", "rest", [_share(day, others(day)) for day in days])
    drawn = chart.lines([day.day for day in days], [*series, rest], unit="%")
    columns = {name: _on(name) for name in versions}
    columns["others"] = lambda day: number(others(day))
    by_day = _by_day("Active installs by version, by day", drawn, days, columns)
    return Question("adoption", ADOPTION, _speed(newest, days), by_day=by_day)


def _on(version: str) -> Callable[[DayOfStats], str]:
    return lambda day: number(day.versions[version]) if version in day.versions else DASH


def _share(day: DayOfStats, installs: Told) -> float | None:
    total = day.by_version.total
    return round(100 * installs / total, 2) if installs is not None and total else None


def _age(version: str) -> tuple[int, ...]:
    """Return what orders versions by their age, a pre-release before its release."""
    release, _, stage = version.partition("-")
    kind, _, n = stage.partition(".")
    return (*map(int, release.split(".")), STAGES.index(kind), int(n or 0))


def _speed(newest: str, days: Sequence[DayOfStats]) -> str:
    told = days[-1].by_version
    share = percent(days[-1].versions[newest], told.total)
    first = next(day.day for day in days if newest in day.versions)
    if first == days[0].day:
        return f"The newest release shown, {newest}, is on {share} of the active installs."
    took = (days[-1].day - first).days
    since = f"{spelled(took)} day{'' if took == 1 else 's'}"
    return (
        f"The newest release shown, {newest}, is on {share} of the active installs, {since} after"
        " it was first seen on five of them."
    )


def _where(stats: Stats) -> Question:
    asked = [name for name in _WHERE if name != "edition" or not stats.edition]
    parts = [
        words.format(*leader)
        for name, words in _MOSTLY.items()
        if name in asked and (leader := _leader(stats.values[name]))
    ]
    answer = f"Most often {', '.join(parts)}." if parts else NONE_TOLD
    tables = [_of_field(name, stats) for name in asked]
    return Question("where", "Where does it run?", answer, tables=tables)


def _leader(told: Distribution) -> tuple[str, str] | None:
    if not told.groups:
        return None
    return told.groups[0].value, percent(told.groups[0].installs, told.total)


def _of_field(name: str, stats: Stats, more: str = "") -> Table:
    """Return the table of a field: its values in their natural order, if they have one."""
    told, form = stats.values[name], _FORMS[name]
    caption = f"{LABELS[name]}{more}{_of_those(told, stats)}"
    if form is Bucket:
        return Table(caption, _shares(told.in_order(key=BUCKETS.index), _bucket))
    if name in _RUNTIMES:
        label = f"{LABELS[name]} {{}}".format
        return Table(caption, _shares(told.in_order(key=_age), label, is_open=True))
    words = _YES_OR_NO.__getitem__ if form is bool else str
    return Table(caption, _shares(told, words, is_open=name in OPEN))


def _of_those(told: Distribution, stats: Stats) -> str:
    """Say how many installs report a field, if not all: an older schema does not have it."""
    if told.reported_by == stats.values["edition"].reported_by:
        return ""
    return f" (of {number(told.reported_by)} installs that report it)"


def _runtimes(stats: Stats) -> Question:
    parts, tables = [], []
    for name in _RUNTIMES:
        told = stats.values[name].in_order(key=_age)
        tables.append(_of_field(name, stats))
        if told.groups:
            oldest = told.groups[0]
            parts.append(
                f"the oldest {LABELS[name]} shown is {oldest.value}, on"
                f" {percent(oldest.installs, told.total)} of the active installs"
            )
    answer = f"{_capital('; '.join(parts))}." if parts else NONE_TOLD
    return Question("runtimes", "Which Python and Postgres must we support?", answer, tables=tables)


def _sizes(stats: Stats) -> Question:
    parts = [
        f"{_bucket(leader[0])} {LABELS[name].lower()} ({leader[1]})"
        for name in ("counts.sites", "counts.users")
        if (leader := _leader(stats.values[name]))
    ]
    answer = f"Most common are {' and '.join(parts)}." if parts else NONE_TOLD
    tables = [_of_field(name, stats) for name in _SIZES]
    return Question("sizes", "How big are installs?", answer, tables=tables)


def _bucket(name: str) -> str:
    return name.replace("-", DASH)


def _features(stats: Stats) -> Question:
    bases = {name: stats.values[name].reported_by for name in UNUSED}
    share = {
        name: installs / base
        for name, installs in stats.features.items()
        if installs is not None and (base := bases[name])
    }
    in_order = sorted(UNUSED, key=lambda name: (-share.get(name, -1), name))
    answer = NONE_TOLD
    if share:
        most, least = (
            max(share, key=lambda name: share[name]),
            min(share, key=lambda name: share[name]),
        )
        answer = (
            f"Most used is “{LABELS[most]}” ({percent(share[most], 1)}), and least"
            f" “{LABELS[least]}” ({percent(share[least], 1)})."
        )
    rows = [
        _row(
            f"{LABELS[name]}{_of_those(stats.values[name], stats)}",
            stats.features[name],
            bases[name] or 0,
        )
        for name in in_order
    ]
    details = [
        _of_field(name, stats, ": on how many sites") for name in UNUSED if UNUSED[name] == "0"
    ]
    table = Table("Active installs that use a feature", rows)
    return Question("features", "Which features are used?", answer, tables=[table], details=details)
