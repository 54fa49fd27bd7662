"""The scenarios are what counting leaves: numbers counted from heartbeats keep the same rules."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import pytest

from app.collector import daily
from app.collector.daily import ABSENT, VALUES
from app.collector.names import KNOWN, OTHER
from tests.browser.collector import seed
from tests.browser.fleet import DAY, Cell, make
from tests.browser.scenarios import SCENARIOS
from tests.conftest import Databases
from tests.support.collector import query

COUNTED = "counted from heartbeats"


@dataclass(frozen=True)
class Numbers:
    """What is in the tables: each day's metrics, and the values of the last day, by cell."""

    scenario: str
    metrics: dict[date, dict[str, Counter[Cell]]]
    values: dict[str, dict[Cell, Counter[str]]]
    released: dict[str, date]

    @property
    def last(self) -> dict[str, Counter[Cell]]:
        return self.metrics[max(self.metrics)]

    def value(self, field: str, edition: str = "") -> Counter[str]:
        cells = self.values[field].items()
        return sum((n for cell, n in cells if edition in {"", cell[1]}), Counter[str]())


def read(url: str, scenario: str = "") -> Numbers:
    metrics: dict[date, dict[str, Counter[Cell]]] = {
        day: defaultdict(Counter) for (day,) in query(url, "SELECT day FROM measured ORDER BY day")
    }
    values: dict[str, dict[Cell, Counter[str]]] = {name: {} for name in VALUES}
    rows = "SELECT day, metric, version, edition, value, installs FROM daily"
    for day, metric, version, edition, value, installs in query(url, rows):
        if metric not in values:
            metrics[day][metric][version, edition] = installs
        elif day == max(metrics):
            values[metric].setdefault((version, edition), Counter())[value] = installs
    released = query(url, "SELECT version, released_on FROM release")
    return Numbers(scenario, metrics, values, dict(released))


@pytest.fixture(scope="module", params=[*(name for name in SCENARIOS if name != "none"), COUNTED])
def numbers(request: pytest.FixtureRequest, databases: Databases) -> Iterator[Numbers]:
    """The numbers of each scenario, and some that were counted from heartbeats."""
    with databases.copy_of("template1") as url:
        now = datetime.now(UTC)
        if request.param == COUNTED:
            seed(url, installs=100, days=70, until=now)
        else:
            make(url, SCENARIOS[request.param], now)
        yield read(url, request.param)


def written(databases: Databases, scenario: str) -> Numbers:
    with databases.copy_of("template1") as url:
        make(url, SCENARIOS[scenario], datetime.now(UTC))
        return read(url)


def test_an_active_install_is_also_active_within_a_longer_time(numbers: Numbers) -> None:
    for each in numbers.metrics.values():
        active = each[daily.ACTIVE_2D]
        assert active <= each[daily.ACTIVE_7D] <= each[daily.ACTIVE_30D]
        assert each[daily.IN_USE] <= active
        assert each[daily.NEW] + each[daily.RETAINED] + each[daily.RETAINED_90] <= active


def test_no_more_installs_are_retained_than_were_new(numbers: Numbers) -> None:
    for day, each in numbers.metrics.items():
        for metric, days in ((daily.RETAINED, 30), (daily.RETAINED_90, 90)):
            then = numbers.metrics.get(day - timedelta(days=days))
            new = then[daily.NEW].total() if then else 0
            assert each[metric].total() <= new


def test_an_install_is_active_within_30_days_from_when_it_is_new_until_it_is_lost(
    numbers: Numbers,
) -> None:
    before = 0
    for each in numbers.metrics.values():
        after = each[daily.ACTIVE_30D].total()
        came_back = after - before - each[daily.NEW].total() + each[daily.LOST].total()
        assert came_back >= 0
        assert came_back == 0 or numbers.scenario == COUNTED
        before = after


def test_each_active_install_has_one_value_of_each_field(numbers: Numbers) -> None:
    for cells in numbers.values.values():
        totals = Counter({cell: values.total() for cell, values in cells.items()})
        assert totals == numbers.last[daily.ACTIVE_2D]


def test_a_field_says_the_same_as_what_it_is_counted_for(numbers: Numbers) -> None:
    consents = numbers.values["counts.consents_last_24h"].items()
    in_use = {cell: values.total() - values["0"] for cell, values in consents}
    assert Counter(in_use) == numbers.last[daily.IN_USE]
    for cell, values in numbers.values["features.compliance_ee"].items():
        assert {*values} == {str(cell[1] == "ee").lower()}


def test_a_version_is_named_from_the_day_it_is_released(numbers: Numbers) -> None:
    for day, each in numbers.metrics.items():
        named = {version for cells in each.values() for version, _ in +cells} - {OTHER}
        assert {version for version in named if numbers.released[version] > day} == set()


def test_the_days_are_without_a_gap(numbers: Numbers) -> None:
    first, last = min(numbers.metrics), max(numbers.metrics)
    assert len(numbers.metrics) == (last - first).days + 1
    if numbers.scenario != COUNTED:
        fleet = SCENARIOS[numbers.scenario]
        assert len(numbers.metrics) == fleet.days
        assert last == daily.finished(datetime.now(UTC)) - fleet.late * DAY
        assert numbers.last[daily.ACTIVE_2D].total() == fleet.installs


def test_a_scenario_is_the_same_each_time(databases: Databases) -> None:
    assert written(databases, "600 installs") == written(databases, "600 installs")


def test_each_of_many_versions_is_on_enough_installs_to_be_named(databases: Databases) -> None:
    found: Counter[str] = Counter()
    for (version, _), installs in written(databases, "80 versions").last[daily.ACTIVE_2D].items():
        found[version] += installs
    assert len(found) == 80 + 1  # and the other ones
    assert min(found.values()) >= 5


def test_each_long_name_is_on_enough_installs_to_be_named(databases: Databases) -> None:
    numbers = written(databases, "long names")
    for field in ("deployment", "python_version", "stack.postgres_version"):
        named = numbers.value(field)
        assert named.keys() >= {*KNOWN[field]}
        assert min(named.values()) >= 5
    assert len(numbers.value("deployment")) == 50
    assert max(map(len, numbers.value("deployment"))) == 32
    assert min(numbers.value("platform").values()) >= 5


def test_some_installs_of_a_later_schema_do_not_report_a_field(databases: Databases) -> None:
    numbers = written(databases, "later schema")
    for field in SCENARIOS["later schema"].reported_since:
        assert 5 <= numbers.value(field)[ABSENT] <= 795


def test_half_of_a_falling_fleet_goes_within_a_month(databases: Databases) -> None:
    days = [*written(databases, "falling").metrics.values()]
    then, now = (days[n][daily.ACTIVE_2D].total() for n in (-31, -1))
    assert then * 0.45 < now < then * 0.55


def test_fewer_than_5_of_an_edition_do_not_use_a_feature(databases: Databases) -> None:
    used = written(databases, "edition").value("features.rate_limit_enabled", "ee")
    assert 1 <= used["false"] < 5 < used["true"]
