"""What is told of small groups: nothing, in no form, and nothing by subtraction either."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import combinations
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.collector import stats, view
from app.collector.daily import ABSENT, MOVEMENTS, OTHER, VALUES, Cells, Filter
from app.collector.page import Templates
from app.collector.stats import Distribution, Group, Stats, Use, distribute, fold, tell, use

UNTIL = date(2026, 5, 2)
AS_OF = datetime(2026, 5, 2, 12, tzinfo=UTC)
VERSIONS = ("7.0.0", "7.1.0", "8.0.0-rc.7")
EDITIONS = ("ce", "ee")
FILTERS = [
    Filter(version, edition) for version in (None, *VERSIONS) for edition in (None, *EDITIONS)
]
TEMPLATES = Templates("/static/style.css")


@dataclass(frozen=True)
class Install:
    """An active install: how it can be chosen, and a value of each kind, or none."""

    version: str
    edition: str
    word: str
    bucket: str
    flag: str

    def value(self, field: str) -> str:
        """Its value of a field, or of its edition."""
        if field == "edition":
            return self.edition
        if field in stats.UNUSED and stats.UNUSED[field] == "false":
            return self.flag
        if field.startswith(("counts.", "features.")):
            return self.bucket
        return {"python_version": "3.12", "stack.postgres_version": "16"}.get(field, self.word)


INSTALLS = st.builds(
    Install,
    version=st.sampled_from(VERSIONS),
    edition=st.sampled_from(EDITIONS),
    word=st.sampled_from(("docker", "heroku", "dokku", OTHER, ABSENT)),
    bucket=st.sampled_from(("0", "1-10", "10-100", "10k+", ABSENT)),
    flag=st.sampled_from(("true", "false", ABSENT)),
)
FLEETS = st.lists(st.tuples(INSTALLS, st.integers(1, 12)), max_size=9).map(
    lambda groups: [install for install, count in groups for _ in range(count)]
)


def cells(installs: Iterable[Install], chosen: Filter, field: str) -> dict[str, Cells]:
    """Count as the database does."""
    found: dict[str, Counter[tuple[bool, bool]]] = {}
    for each in installs:
        value = each.version if field == "version" else each.value(field)
        of_version = chosen.version in {None, each.version}
        of_edition = chosen.edition in {None, each.edition}
        found.setdefault(value, Counter())[(of_version, of_edition)] += 1
    return {
        value: (
            count[True, True],
            count[True, False],
            count[False, True],
            count[False, False],
        )
        for value, count in found.items()
    }


def told(installs: list[Install], chosen: Filter) -> Stats:
    """Tell of a fleet that was all there on each of a few days."""
    days = [UNTIL - timedelta(days=n) for n in range(3)]
    own = sum(each[0] for each in cells(installs, chosen, "edition").values())
    return tell(
        stats.Numbers(
            movements={day: dict.fromkeys(MOVEMENTS, own) for day in days},
            versions={day: cells(installs, chosen, "version") for day in days},
            values={field: cells(installs, chosen, field) for field in ("edition", *VALUES)},
        ),
        as_of=AS_OF,
        since=days[-1],
        until=days[0],
        chosen=chosen,
    )


def numbers(value: Any) -> Iterator[int]:
    """Every number in a JSON document."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int):
        yield value


NOT_INSTALLS = re.compile(
    r"<svg.*?</svg>\s*</svg>|<svg.*?</svg>"  # geometry; what it says is looked at apart
    r"|<(?:script|style|link|option|label|select|input|h1|h2|meta|footer|title).*?>"
    r"|<[^>]*>|\bfewer than 5\b|[\d.,<>]+%|\d+-\d+-\d+|\d+ [A-Z][a-z]+ \d{4}|\d\d:\d\d"
    r"|\d+\.\d+\.\d+(-rc\.\d)?|Python 3\.12|[\d,k]+\N{EN DASH}[\d,k]+|48 hours|24 hours|TCF 2\.2"
    r"|from 1 to 4",
    re.DOTALL,
)


def small(words: str) -> list[str]:
    """The whole numbers from 1 to 4 in what a reader sees, but for dates, versions and shares."""
    return re.findall(r"(?<![\w.,])[1-4](?![\w.,]\w)(?!\w)", NOT_INSTALLS.sub(" ", words))


def svg_words(html: str) -> str:
    """What the charts say in words, but for the days of the axis."""
    said = re.findall(r"<(?:title|desc|text)[^>]*>([^<]*)<", html)
    return " | ".join(each for each in said if not re.fullmatch(r"\d+ [A-Z][a-z]{2}", each))


@settings(max_examples=150, deadline=None)
@given(FLEETS, st.sampled_from(FILTERS))
@example([Install("7.0.0", "ce", "docker", "0", "true")] * 3, Filter())
@example([Install("7.0.0", "ce", "docker", "0", "true")] * 5, Filter())
def test_no_number_from_1_to_4_is_in_what_is_told(fleet: list[Install], chosen: Filter) -> None:
    answer = told(fleet, chosen)
    document = json.loads(json.dumps(stats.document(answer)))
    assert not {1, 2, 3, 4} & {*numbers(document)}
    lines = [*csv.reader(io.StringIO("\n".join(",".join(row) for row in stats.rows(answer))))]
    assert not {"1", "2", "3", "4"} & {
        told for *_, installs, of in lines for told in (installs, of)
    }
    html = TEMPLATES.page(answer, days="90", query="")
    assert not small(html)
    assert not small(svg_words(html))


@pytest.mark.parametrize("said", ["<td>3", "<dd>4</dd>", "<p>2 installs were heard of.", "was 1,"])
def test_a_small_number_on_a_page_would_be_seen(said: str) -> None:
    assert small(said)


# Of all, 12 docker hide 3 heroku; of 7.0.0, or of ce, 4 dokku would be enough for that.
HIDDEN_OTHERWISE = [
    Install(version, edition, word, "0", "true")
    for version, edition, word, count in (
        ("7.0.0", "ce", "heroku", 3),
        ("7.0.0", "ce", "dokku", 4),
        ("7.1.0", "ee", "dokku", 16),
        ("7.0.0", "ce", "docker", 6),
        ("7.1.0", "ee", "docker", 6),
    )
    for _ in range(count)
]


@settings(max_examples=200, deadline=None)
@given(FLEETS)
@example(HIDDEN_OTHERWISE)
def test_nothing_from_1_to_4_can_be_worked_out_from_two_answers(fleet: list[Install]) -> None:
    answers = [told(fleet, chosen) for chosen in FILTERS]
    for one, other in combinations([each for each in answers if each.days], 2):
        inner, outer = (one, other) if _is_within(one, other) else (other, one)
        if not _is_within(inner, outer):
            continue
        pairs = [
            (_sizes(outer.values[name], outer), _sizes(inner.values[name], inner))
            for name in inner.values
        ]
        versions = [_sizes(each.days[-1].by_version, each) for each in (outer, inner)]
        for whole, part in [*pairs, (versions[0], versions[1])]:
            _cannot_be_told_apart(whole, part)


def _is_within(inner: Stats, outer: Stats) -> bool:
    return outer.version in {None, inner.version} and outer.edition in {None, inner.edition}


FOLDED = "folded"


def _cannot_be_told_apart(whole: dict[str, int], part: dict[str, int]) -> None:
    assert fold(sum(whole.values()) - sum(part.values())) is not None
    # What only the outer answer tells is folded in the inner one; never the other way round.
    assert part.keys() <= whole.keys()
    for value in part.keys() - {FOLDED}:
        assert fold(whole[value] - part[value]) is not None
    rest = {value: n for value, n in whole.items() if value not in part or value == FOLDED}
    assert fold(sum(rest.values()) - part[FOLDED]) is not None


def _sizes(told: Distribution, answer: Stats) -> dict[str, int]:
    """Every group's size, as far as it can be worked out from one answer."""
    sizes = {group.value: group.installs for group in told.groups}
    if told.reported_by is not None:
        sizes[ABSENT] = answer.values["edition"].total - told.reported_by
        assert sum(sizes.values()) - sizes[ABSENT] + (told.folded_installs or 0) == told.reported_by
    for size in sizes.values():
        assert fold(size) is not None
    return {**sizes, FOLDED: told.folded_installs or 0}


@settings(max_examples=200, deadline=None)
@given(FLEETS, st.sampled_from(FILTERS))
def test_what_is_told_adds_up_to_what_there_is(fleet: list[Install], chosen: Filter) -> None:
    answer = told(fleet, chosen)
    own = sum(each[0] for each in cells(fleet, chosen, "edition").values())
    for name, each in answer.values.items():
        assert sum(_sizes(each, answer).values()) == (fold(own) or 0)
        assert all(group.installs >= stats.FOLD_BELOW for group in each.groups)
        assert not {OTHER, ABSENT} & {group.value for group in each.groups}
        silent = cells(fleet, chosen, name).get(ABSENT, (0,))[0]
        assert each.reported_by in {None, own - silent}
    for used in answer.features.values():
        assert used.installs is None or used.installs <= own


@given(st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 30)))
def test_without_a_filter_a_group_is_folded_only_for_being_small_or_for_hiding_one_that_is(
    counts: dict[str, int],
) -> None:
    answer = distribute(whole(counts))
    few = sum(n for n in counts.values() if n < stats.FOLD_BELOW)
    large = sorted(n for n in counts.values() if n >= stats.FOLD_BELOW)
    kept = large if few == 0 or few >= stats.FOLD_BELOW else large[1:]
    assert sorted(group.installs for group in answer.groups) == kept


def whole(counts: Mapping[str, int]) -> dict[str, Cells]:
    return {value: (installs, 0, 0, 0) for value, installs in counts.items()}


def test_zero_is_told_and_1_to_4_are_not() -> None:
    assert [fold(n) for n in range(7)] == [0, None, None, None, None, 5, 6]


def test_the_commonest_comes_first_and_the_others_have_no_name() -> None:
    answer = distribute(whole({"rare": 3, "c": 9, "b": 9, "a": 30, OTHER: 40, "odd": 2}))
    assert answer == Distribution([Group("a", 30), Group("b", 9), Group("c", 9)], 45, 93)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"true": 9, "false": 91}, Use(9, "exactly")),
        ({"true": 100}, Use(100, "exactly")),
        ({"false": 100}, Use(0, "exactly")),
        ({"true": 4, "false": 96}, Use(None, "fewer than 5")),
        ({"true": 96, "false": 4}, Use(None, "all but fewer than 5")),
        ({}, Use(0, "exactly")),
    ],
)
def test_of_a_feature_neither_side_is_told_when_one_is_small(
    counts: dict[str, int], said: Use
) -> None:
    answer = distribute(whole(counts))
    assert use(whole(counts), answer, "false") == said
    if said.installs is None:
        assert answer == Distribution([], 100, 100)


def test_a_feature_is_told_by_its_sites_without_what_is_folded_for_others() -> None:
    counts = whole({"0": 6, "1-10": 50, "10-100": 3})
    answer = distribute(counts)
    assert answer == Distribution([Group("1-10", 50)], 9, 59)
    assert use(counts, answer, "0") == Use(None, "not told")


@pytest.mark.parametrize(
    ("counts", "answer", "said"),
    [
        # 40 of 100 do not have the field: they are no users of it, and no others.
        (
            {"true": 20, "false": 40, ABSENT: 40},
            Distribution([Group("false", 40), Group("true", 20)], 0, 60),
            Use(20, "exactly"),
        ),
        ({"true": 47, ABSENT: 40}, Distribution([Group("true", 47)], 0, 47), Use(47, "exactly")),
        ({ABSENT: 100}, Distribution([], 0, 0), Use(0, "exactly")),
        # With a base of 57, the 3 that do not report it could be worked out.
        (
            {"true": 17, "false": 40, ABSENT: 3},
            Distribution([Group("false", 40)], 20, None),
            Use(None, "not told"),
        ),
        # Of the first few that have it, nothing is told, nor how many they are.
        ({"true": 3, ABSENT: 97}, Distribution([], 100, None), Use(None, "fewer than 5")),
        # Two small groups hide each other, and the base stays.
        (
            {"0": 50, "1-10": 3, "10-100": 4, ABSENT: 6},
            Distribution([Group("0", 50)], 7, 57),
            Use(7, "exactly"),
        ),
    ],
)
def test_a_field_is_told_of_the_installs_that_report_it(
    counts: dict[str, int], answer: Distribution, said: Use
) -> None:
    assert distribute(whole(counts)) == answer
    assert use(whole(counts), answer, "0" if "0" in counts else "false") == said


def test_the_page_says_of_how_many_installs_a_field_is_told() -> None:
    fleet = [
        *[Install("7.0.0", "ce", "docker", "0", "true")] * 1_200,
        *[Install("7.1.0", "ce", ABSENT, "0", ABSENT)] * 300,
        *[Install("7.1.0", "ce", "heroku", ABSENT, "true")] * 3,
    ]
    html = TEMPLATES.page(told(fleet, Filter()), days="90", query="")
    assert "Deployment (of 1,203 installs that report it)" in html
    assert "Rate limit (of 1,203 installs that report it)" in html
    assert "Organisations (how many installs report it is not told)" in html
    assert "Edition (of" not in html


FLEET = [
    *[Install("7.0.0", "ce", "docker", "1-10", "true")] * 40,
    *[Install("7.1.0", "ce", "docker", "0", "false")] * 30,
    *[Install("7.1.0", "ee", "heroku", "0", "false")] * 20,
    *[Install("8.0.0-rc.7", "ce", "dokku", "0", "false")] * 3,
]


def test_only_versions_of_at_least_5_installs_can_be_chosen() -> None:
    # 7.0.0 is told; with 3 left over, 7.0.0, the smaller of two, hides them.
    answer = told(FLEET, Filter())
    assert (answer.all_versions, answer.all_editions) == (["7.1.0"], ["ce", "ee"])


def test_what_cannot_be_chosen_gets_the_same_answer_as_what_does_not_exist() -> None:
    for there in ("8.0.0-rc.7", "7.0.0"):
        found, missing = (stats.document(told(FLEET, Filter(v))) for v in (there, "99.9.9"))
        assert (found.pop("version"), missing.pop("version")) == (there, "99.9.9")
        assert found == missing
        assert (found["days"], found["values"], found["features"]) == ([], {}, {})
    only_ce = [each for each in FLEET if each.edition == "ce"]
    none = stats.document(told(only_ce, Filter(edition="ee")))
    few = stats.document(
        told(
            [*only_ce[:60], *[Install("7.1.0", "ee", "docker", "0", "true")] * 3],
            Filter(edition="ee"),
        )
    )
    assert (none["days"], none["values"]) == (few["days"], few["values"]) == ([], {})


def test_both_filters_at_once_tell_nothing_that_each_alone_would_not() -> None:
    fleet = [
        *[Install("7.0.0", "ce", "docker", "0", "true")] * 40,
        *[Install("7.0.0", "ee", "docker", "0", "true")] * 2,
        *[Install("7.1.0", "ce", "docker", "0", "true")] * 30,
        *[Install("7.1.0", "ee", "docker", "0", "true")] * 30,
    ]
    assert told(fleet, Filter("7.0.0")).days
    assert told(fleet, Filter(edition="ce")).days
    assert not told(fleet, Filter("7.0.0", "ce")).days


def test_every_feature_has_a_value_that_means_unused() -> None:
    assert {*stats.UNUSED} == {name for name in VALUES if name.startswith("features.")}


def test_every_day_is_told_in_its_order_and_a_day_without_numbers_is_zero() -> None:
    answer = tell(
        stats.Numbers(movements={}, versions={}, values={}),
        as_of=AS_OF,
        since=UNTIL - timedelta(days=2),
        until=UNTIL,
        chosen=Filter(),
    )
    assert [each.day.isoformat() for each in answer.days] == [
        "2026-04-30",
        "2026-05-01",
        "2026-05-02",
    ]
    assert all(each.movements == dict.fromkeys(MOVEMENTS, 0) for each in answer.days)


def test_the_document_has_its_documented_shape() -> None:
    document = stats.document(told(FLEET, Filter()))
    assert [*document] == [
        "as_of",
        "since",
        "until",
        "version",
        "edition",
        "fold_below",
        "days",
        "values",
        "features",
        "all_versions",
        "all_editions",
    ]
    assert document["days"][-1] == {
        "day": "2026-05-02",
        "movements": dict.fromkeys(MOVEMENTS, 93),
        "versions": {"7.1.0": 50},
        "other_versions": 43,
    }
    assert document["values"]["edition"] == {
        "groups": [{"value": "ce", "installs": 73}, {"value": "ee", "installs": 20}],
        "folded_installs": 0,
        "reported_by": 93,
    }
    assert document["features"]["features.rate_limit_enabled"] == {
        "installs": 40,
        "words": "exactly",
    }


def test_the_csv_says_the_same_as_the_document() -> None:
    silent = [Install("7.1.0", "ce", "docker", "0", ABSENT)] * 6
    lines = {row[:3]: row[3:] for row in stats.rows(told([*FLEET[:-3], *silent], Filter()))}
    assert lines["2026-05-02", "active_2d", ""] == ("96", "")
    assert lines["2026-05-01", "version", "7.1.0"] == ("56", "96")
    assert lines["2026-05-01", "version", OTHER] == ("0", "96")
    assert lines["2026-05-02", "features.rate_limit_enabled", "used"] == ("40", "90")
    assert lines["2026-05-02", "platform", OTHER] == ("0", "96")


def test_every_field_that_is_counted_has_a_label_on_the_page() -> None:
    missing = {"version", "edition", *VALUES} - view.LABELS.keys()
    assert not missing, f"name {', '.join(missing)} in LABELS of app/collector/view.py"
    assert not view.LABELS.keys() - {"version", "edition", *VALUES}


@pytest.mark.parametrize(
    ("part", "whole_of_it", "said"),
    [
        (0, 9, "0%"),
        (9, 9, "100%"),
        (1, 1000, "<1%"),
        (999, 1000, ">99%"),
        (1, 3, "33%"),
        (0, 0, "0%"),
    ],
)
def test_a_share_is_none_or_all_only_where_it_is(part: int, whole_of_it: int, said: str) -> None:
    assert view.percent(part, whole_of_it) == said
