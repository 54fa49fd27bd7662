"""The numbers of the page for a machine: as JSON and as CSV. Pure."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from typing import Any

from app.collector.daily import ACTIVE_2D, DAY, DEV_BUILDS, LOST, NEW
from app.collector.names import OTHER
from app.collector.rounding import FEW, Shown
from app.collector.stats import DayOfStats, Stats


def document(stats: Stats) -> dict[str, Any]:
    """Return the content of ``stats.json``: all fields of ``stats``, with ISO dates."""
    found: dict[str, Any] = _with_iso_dates(asdict(stats))
    return found


def _with_iso_dates(value: Any) -> Any:
    match value:
        case dict():
            return {name: _with_iso_dates(each) for name, each in value.items()}
        case tuple() if hasattr(value, "_asdict"):
            return _with_iso_dates(value._asdict())
        case list():
            return [_with_iso_dates(each) for each in value]
        case date():
            return value.isoformat()
    return value


Line = tuple[str, str, str, str, str]


def rows(stats: Stats) -> Iterator[Line]:
    """Yield the lines of ``stats.csv``, the names of the columns first.

    ``of`` is how many installs report the metric, or the whole of which it is a part. The value
    ``OTHER`` means all values that are not named; ``used`` means the installs that use a feature.
    The day of a period or a month is its first day; that of a live number is its time.
    """
    yield "day", "metric", "value", "installs", "of"
    before = stats.a_month_before
    if before and stats.since and before.day < stats.since:
        yield _line(before.day, ACTIVE_2D, "", before.active)
    for each in stats.days:
        yield from _lines_of_day(each)
    yield from _lines_over_time(stats)
    for name, shown in stats.values.items():
        for group in shown.groups:
            yield _line(stats.until, name, group.value, group.installs, _cell(shown.reported_by))
        yield _line(stats.until, name, OTHER, shown.folded_installs, _cell(shown.reported_by))
    for name, feature in stats.features.items():
        yield _line(stats.until, name, "used", feature.installs, _cell(feature.of))
    if stats.live:
        yield _line(stats.live.as_of, "live", "active", stats.live.active)
        yield _line(stats.live.as_of, "live", "not_established", stats.live.not_established)


def _lines_of_day(day: DayOfStats) -> Iterator[Line]:
    for name, installs in {**day.movements, DEV_BUILDS: day.dev_builds}.items():
        yield _line(day.day, name, "", installs)
    of = _cell(day.by_version.reported_by)
    for version, shown in [*day.versions.items(), (OTHER, day.other_versions)]:
        yield _line(day.day, "version", version, shown, of)


def _lines_over_time(stats: Stats) -> Iterator[Line]:
    if growth := stats.growth:
        for period in growth.periods:
            for name, installs in ((NEW, period.new), (LOST, period.lost)):
                yield _line(period.since, f"{name}_in_{growth.by}", "", installs)
    for cohort in stats.cohorts:
        of = _cell(cohort.established)
        for after, installs in cohort.retained.items():
            yield _line(cohort.month, "retained", after, installs, of)
        yield _line(cohort.month, "established", "", cohort.established)
    for release in stats.adoption:
        for share in release.days:
            day = release.released_on + share.after * DAY
            yield _line(day, "or_newer", release.version, share.installs, str(share.of))


def _line(day: date | None, metric: str, value: str, installs: Shown, of: str = "") -> Line:
    return (day.isoformat() if day else "", metric, value, _cell(installs), of)


def _cell(installs: Shown) -> str:
    return FEW if installs is None else str(installs)
