"""What is shown of few installs: nothing, in no form, and nothing by comparing two answers."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from app.collector import exports, phrases, rounding, stats
from app.collector.adoption import Adoption, Release
from app.collector.daily import (
    ABSENT,
    ACTIVE_2D,
    ACTIVE_7D,
    ACTIVE_30D,
    DEV_BUILDS,
    IN_USE,
    STOCKS,
    VALUES,
    Counted,
    Counts,
    Filter,
    Span,
)
from app.collector.names import OTHER
from app.collector.rendering import Templates
from app.collector.rounding import Distribution, Group, about, distribute, fold
from app.collector.stats import Before, Feature, LiveStats, Numbers, Recount, Stats, feature, show
from tests.unit.fleets import AS_OF, DAYS, EDITIONS, FLEET, LAST, LISTED, Install, count, stats_of

FILTERS = [
    Filter(version, edition)
    for version in (None, *LISTED, "99.9.9")
    for edition in (None, *EDITIONS)
]
TEMPLATES = Templates(established_days=30)
SMALL = {1, 2, 3, 4}

INSTALLS = st.builds(
    Install,
    version=st.sampled_from((*LISTED, OTHER)),
    edition=st.sampled_from(EDITIONS),
    word=st.sampled_from(("docker", "heroku", "dokku", OTHER, ABSENT)),
    bucket=st.sampled_from(("0", "1-10", "10-100", "10k+", ABSENT)),
    flag=st.sampled_from(("true", "false", ABSENT)),
    comes=st.integers(0, 4),
    upgrades=st.integers(0, 6),
    leaves=st.integers(2, 6),
)
FLEETS = st.lists(st.tuples(INSTALLS, st.integers(1, 14)), max_size=12).map(
    lambda groups: [install for install, count in groups for _ in range(count)]
)


def page(answer: Stats) -> str:
    return TEMPLATES.page(answer)


# What a curious stranger reads out of each form.


def is_filtered(answer: Stats) -> bool:
    return (answer.version, answer.edition) != (None, None)


def numbers(value: Any) -> Iterator[int]:
    """Every number in a JSON document."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int):
        yield value


EXACT = {ACTIVE_2D, ACTIVE_7D, ACTIVE_30D, DEV_BUILDS}
"""What docs/collector.md calls totals: exact without a filter."""


def of_document(answer: Stats) -> tuple[set[int], set[int]]:
    """The totals in the JSON, and all other numbers of installs."""
    document = json.loads(json.dumps(exports.document(answer)))
    days = [{**each.pop("movements"), **each} for each in document["days"]]
    shares = [day for each in document["adoption"] for day in each["days"]]
    totals = {*numbers(document["live"])}
    others = [document[name] for name in ("values", "features", "growth", "cohorts")]
    others += [[day["installs"], day["of"]] for day in shares]
    for day in days:
        for name, each in day.items():
            if name in EXACT and not is_filtered(answer):
                totals |= {*numbers(each)}
            else:
                others.append(each)
    before = {*numbers(document["a_month_before"])}
    return (
        (totals, {*numbers(others), *before})
        if is_filtered(answer)
        else (
            totals | before,
            {*numbers(others)},
        )
    )


def of_csv(answer: Stats) -> tuple[set[int], set[int]]:
    """The totals in the CSV, and all other numbers of installs."""
    _, *lines = csv.reader(io.StringIO("\n".join(",".join(row) for row in exports.rows(answer))))
    totals, others = set[int](), set[int]()
    for _, metric, _, installs, of in lines:
        is_total = metric == "live" or (metric in EXACT and not is_filtered(answer))
        (totals if is_total else others).update(int(n) for n in (installs, of) if n.isdigit())
    return totals, others


NOT_INSTALLS = re.compile(
    r"<svg.*?</svg>\s*</svg>|<svg.*?</svg>|<[^>]*>"  # geometry is looked at apart
    r"|\bfewer than 5\b|numbers below 5|5 or more"
    r"|[\d.,<>&;lgt]+%|\d+-\d+-\d+|\d+ [A-Z][a-z]+( \d{4})?|\d\d:\d\d|\d+-\d+"
    r"|\d+\.\d+\.\d+(-rc\.\d)?|Python 3\.12|Postgres 16|(Postgres|Python) shown is [\d.]+"
    r"|[\d,k]+\N{EN DASH}[\d,k]+|10k\+|(48|24) hours|\d+ days?|TCF 2\.2|after 90",
    re.DOTALL,
)


def whole_numbers(html: str) -> set[int]:
    """The numbers that a reader sees, but for dates, versions, sizes and shares."""
    words = NOT_INSTALLS.sub(" ", html)
    return {int(n.replace(",", "")) for n in re.findall(r"(?<![\w.,])\d[\d,]*(?![\w%])", words)}


def sections(html: str) -> dict[str, str]:
    found = re.findall(r'<section id="(\w+)".*?</section>', html, re.DOTALL)
    parts = re.findall(r'<section id="\w+".*?</section>', html, re.DOTALL)
    return dict(zip(found, parts, strict=True))


def listing(section: str) -> list[dict[str, str]]:
    """The rows of a table of numbers, with the names of its columns."""
    found = re.search(r'<table class="listing">.*?</table>', section, re.DOTALL)
    assert found
    head, *lines = re.findall(r"<tr>.*?(?=<tr>|</t)", found[0], re.DOTALL)
    names = re.findall(r'<th scope="col">([^<\n]*)', head)
    cells = (re.findall(r"<t[hd][^>]*>([^<\n]*)", line) for line in lines)
    return [dict(zip(names, row, strict=True)) for row in cells]


def number(cell: str) -> int | None:
    return int(cell.replace(",", "")) if re.fullmatch(r"[\d,]+", cell) else None


def of_page(answer: Stats) -> tuple[set[int], set[int]]:
    """The totals on the page, and all other numbers of installs."""
    html = page(answer).partition("<footer>")[0]
    parts = sections(html)
    active = parts.pop("active", "")
    totals, others = whole_numbers(active), set[int]()
    for line in listing(active) if active else ():
        others |= {n for n in (number(line["In use"]),) if n}
    # A change is the difference of two totals, and has a sign.
    totals |= whole_numbers(" ".join(SIGNED.findall(parts.get("growth", ""))))
    others |= whole_numbers(SIGNED.sub(" ", " ".join(parts.values())))
    return (set(), totals | others) if is_filtered(answer) else (totals, others)


SIGNED = re.compile(r"[+\N{MINUS SIGN}][\d,]+ ")
FORMS = (of_document, of_csv, of_page)


@pytest.mark.parametrize(
    "said", ["<td>3", "<dd>4</dd>", "<p>2 installs were heard of.", "was 1,", "(3 of them)"]
)
def test_a_small_number_on_a_page_would_be_seen(said: str) -> None:
    assert whole_numbers(said) & SMALL


def test_the_stranger_reads_every_number_of_a_page() -> None:
    totals, others = of_page(stats_of(FLEET))
    assert {93, 0} <= totals
    assert {75, 20, 70, 40, 95} <= others


# One at a time: each day one more, or one less, and one that is upgraded.
ONE_BY_ONE = [
    *[Install()] * 11,
    *[Install(edition="ee", word="heroku", comes=n) for n in range(5)],
    *[Install(edition="ee", bucket="1-10", leaves=n) for n in range(2, 6)],
    *[Install(word="dokku", flag="false", upgrades=n) for n in range(6)],
]


# To make a failure smaller would take minutes.
@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(FLEETS)
@example([Install()] * 3)
@example([Install()] * 5)
@example(ONE_BY_ONE)
def test_no_number_and_no_difference_of_two_is_from_1_to_4(fleet: list[Install]) -> None:
    shown = set[int]()
    for chosen in FILTERS:
        for until in range(1, 6):
            for since in {0, until - 1, until}:
                answer = stats_of(fleet, chosen, since=since, until=until)
                for read in (of_document, of_csv):
                    totals, others = read(answer)
                    assert not totals & SMALL
                    shown |= others
            shown |= of_page(answer)[1]
    assert not shown & SMALL
    assert not {larger - smaller for smaller, larger in pairwise(sorted(shown))} & SMALL


@given(FLEETS, st.sampled_from(FILTERS))
@example(ONE_BY_ONE, Filter())
def test_each_form_of_an_answer_shows_the_same_numbers(
    fleet: list[Install], chosen: Filter
) -> None:
    answer = stats_of(fleet, chosen)
    (totals, others), of_lines, (_, on_page) = (read(answer) for read in FORMS)
    assert of_lines[0] == totals
    # The base of versions is that of all fields: only the CSV repeats it.
    assert {*of_lines[1]} - others <= {about(n) for n in totals}
    assert not whole_numbers(page(answer).partition("<footer>")[0]) & SMALL
    assert all(n % 5 == 0 for n in on_page | others | of_lines[1])


def bars(section: str) -> Iterator[tuple[list[tuple[int, float, str]], bool]]:
    """The rows of each table with bars: the number, the width and the words of its share."""
    for table in re.findall(r'<table class="bars">.*?</table>', section, re.DOTALL):
        yield (
            [
                (int(installs.replace(",", "")), float(width), share.replace("&lt;", "<"))
                for width, installs, share in re.findall(
                    r'<rect width="([\d.]+)%".*?<td class="n">([\d,]+)<td class="n">([^<\n]*%)',
                    table.replace("&gt;", ">"),
                )
            ],
            "that use a feature" in table,
        )


@given(FLEETS, st.sampled_from(FILTERS))
@example(ONE_BY_ONE, Filter())
def test_every_share_width_and_line_follows_from_the_numbers_next_to_it(
    fleet: list[Install], chosen: Filter
) -> None:
    answer = stats_of(fleet, chosen)
    parts = sections(page(answer))
    for section in parts.values():
        for rows, by_base in bars(section):
            whole = sum(installs for installs, _, _ in rows)
            bases = {each.reported_by for each in answer.values.values()}
            bases |= {each.of for each in answer.features.values()}
            for installs, width, share in rows:
                wholes = bases if by_base else {max(whole, n or 0) for n in bases}
                assert (width, share) in {
                    (round(100 * installs / n, 1), phrases.percent(installs, n))
                    for n in wholes
                    if n
                } or (width, share, installs) == (0, "0%", 0)
    for number, adoption in enumerate(answer.adoption if "adoption" in parts else ()):
        _line_is_of(parts["adoption"], number, adoption)


def _line_is_of(section: str, number: int, adoption: Adoption) -> None:
    """The height of each point is the share of those that run the release or a newer one."""
    highest = re.findall(r'<text class="y" y="[\d.]+"[^>]*>(\d+)%', section)
    top = max(map(int, highest))
    (path,) = re.findall(rf'<path class="m{number}" d="(M(?!1 6h24)[^"]*)"', section)
    drawn = [top * (1 - float(y) / 200) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    shown = [100 * day.installs / day.of for day in adoption.days]
    assert drawn == pytest.approx(shown, abs=top / 1000)


@settings(max_examples=150)
@given(FLEETS, st.sampled_from(FILTERS), st.data())
@example(ONE_BY_ONE, Filter(), None)
def test_two_fleets_with_the_same_rounded_numbers_look_the_same(
    fleet: list[Install], chosen: Filter, data: st.DataObject | None
) -> None:
    # As many as before of each field, but some in another group that is rounded to the same.
    counts = count(fleet, 0, 5, chosen)
    values = {name: _moved(spread, data) for name, spread in counts.values.items()}
    assume(all(_rounded(values[name]) == _rounded(counts.values[name]) for name in values))
    answers = [
        show(stats.nothing(chosen), each, Span(DAYS[0], DAYS[5], AS_OF), days=90)
        for each in (counts, replace(counts, values=values))
    ]
    assert answers[0].features == answers[1].features or data
    if answers[0].features == answers[1].features:
        assert answers[0].values == answers[1].values
        assert page(answers[0]) == page(answers[1])


def _moved(spread: Counts, data: st.DataObject | None) -> Counts:
    groups = sorted(value for value, n in spread.items() if n >= rounding.FOLD_BELOW)
    if data is None or len(groups) < 2:
        return spread
    one, other = data.draw(st.permutations(groups))[:2]
    moving = data.draw(st.integers(1, 4))
    return {**spread, one: spread[one] - moving, other: spread[other] + moving}


def _rounded(spread: Counts) -> dict[str, int | None]:
    return {value: about(n) for value, n in spread.items()}


def test_the_order_of_groups_does_not_show_which_of_two_equal_numbers_was_larger() -> None:
    assert distribute({"a": 6, "b": 7}) == distribute({"a": 7, "b": 6})


def test_one_answer_does_not_show_whether_few_or_none_are_outside_its_groups() -> None:
    none, one_other = stats_of([Install()] * 9), stats_of([*[Install()] * 8, Install(edition="ee")])
    assert none.days[-1].movements[ACTIVE_2D] == one_other.days[-1].movements[ACTIVE_2D] == 9
    assert none.values["edition"] == one_other.values["edition"]
    assert none.values["edition"] == Distribution([Group("ce", 10)], None, 10)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_the_exact_number_of_all_does_not_give_away_how_few_the_others_are(
    sizes: list[int],
) -> None:
    everyone, answer = sum(sizes), distribute({f"g{n}": size for n, size in enumerate(sizes)})
    assume(answer.folded_installs is None and answer.groups)
    named = [range(max(5, each.installs - 2), each.installs + 3) for each in answer.groups]
    possible = {everyone - sum(each) for each in product(*named)} & {*range(5)}
    assert len(possible) > 1 or possible == {0}


# What docs/collector.md says to remain.


def test_what_remains_is_to_see_that_a_threshold_was_passed() -> None:
    before, after = ([*[Install()] * 13, *[Install(edition="ee")] * n] for n in (4, 5))
    assert [stats_of(each).all_editions for each in (before, after)] == [["ce"], ["ce", "ee"]]


# The rule.


def test_of_all_installs_zero_is_shown_and_1_to_4_are_not() -> None:
    assert [fold(n) for n in range(7)] == [0, None, None, None, None, 5, 6]


def test_what_is_rounded_is_never_rounded_up_from_less_than_5() -> None:
    shown = [about(n) for n in range(14)]
    assert shown == [*[None] * 5, 5, 5, 5, 10, 10, 10, 10, 10, 15]


@given(st.integers(5, 10**7))
def test_a_rounded_number_is_within_2_of_the_true_one(installs: int) -> None:
    shown = about(installs)
    assert shown is not None
    assert shown % rounding.ROUNDED_TO == 0
    assert abs(shown - installs) <= 2
    assert about(shown) == shown


def test_the_commonest_comes_first_and_the_others_have_no_name() -> None:
    answer = distribute({"rare": 3, "c": 9, "b": 9, "a": 31, OTHER: 40, "odd": 2, ABSENT: 77})
    assert answer == Distribution([Group("a", 30), Group("b", 10), Group("c", 10)], 45, 95)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", OTHER, ABSENT]), st.integers(0, 30)))
def test_a_group_is_named_if_it_has_5_and_is_on_a_list(counts: Counts) -> None:
    answer = distribute(counts)
    named = {value: n for value, n in counts.items() if n >= 5 and value not in {OTHER, ABSENT}}
    rest = sum(n for value, n in counts.items() if value not in {*named, ABSENT})
    if rest == 4 and all(n % 5 == 2 for n in named.values()):
        return  # see the test of the exact number of all
    assert {group.value for group in answer.groups} == named.keys()
    assert answer.folded_installs == about(rest)
    assert answer.reported_by == about(sum(counts.values()) - counts.get(ABSENT, 0))


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"true": 9, "false": 91}, 10),
        ({"true": 100}, 100),
        ({"false": 100}, None),
        ({"true": 4, "false": 96}, None),
        ({"true": 96, "false": 4}, 95),
        ({"true": 20, "false": 40, ABSENT: 40}, 20),
        ({ABSENT: 100}, None),
        ({}, None),
    ],
)
def test_a_feature_is_used_by_those_that_report_another_value_than_unused(
    counts: Counts, shown: int | None
) -> None:
    assert feature(counts, "false").installs == shown


def test_who_does_not_use_a_feature_is_not_counted_with_those_that_do() -> None:
    # 16 installs, exactly: if "0" was named, or missing, it would be known how many the others are.
    fleet = [*[Install(bucket="0")] * 4, *[Install(bucket="1-10")] * 12]
    answer = stats_of(fleet)
    field = "features.tcf_v22_sites"
    assert answer.features[field] == Feature(10, 15)
    assert answer.values[field] == Distribution([Group("1-10", 10)], None, 10)
    assert answer.features["features.rate_limit_enabled"] == Feature(15, 15)
    assert "features.rate_limit_enabled" not in answer.values


def test_a_feature_is_used_by_all_whose_sites_use_it_however_many_they_are() -> None:
    assert feature({"0": 6, "1-10": 50, "10-100": 3, "10k+": 4}, "0") == Feature(55, 65)


def test_totals_are_exact_without_a_filter_and_everything_else_is_rounded() -> None:
    everyone, some = stats_of(FLEET).days[-1], stats_of(FLEET, Filter(edition="ce")).days[-1]
    assert everyone.movements[ACTIVE_2D] == everyone.movements[ACTIVE_30D] == 93
    assert everyone.movements[IN_USE] == 40
    assert some.movements[ACTIVE_2D] == 75  # of 73
    assert stats.EXACT == EXACT


def test_versions_and_editions_to_filter_by_have_at_least_5_installs_and_a_name() -> None:
    answer = stats_of([*FLEET, *[Install(OTHER)] * 50])
    assert (answer.all_versions, answer.all_editions) == (["7.0.0", "7.1.0"], ["ce", "ee"])


@pytest.mark.parametrize("there", ["8.0.0-rc.7", OTHER])
def test_what_cannot_be_filtered_by_gets_the_answer_of_what_does_not_exist(there: str) -> None:
    fleet = [*FLEET, *[Install(OTHER)] * 50]
    found, missing = (exports.document(stats_of(fleet, Filter(v))) for v in (there, "99.9.9"))
    assert (found.pop("version"), missing.pop("version")) == (there, "99.9.9")
    assert found == missing
    assert (found["days"], found["values"], found["features"]) == ([], {}, {})


def test_an_edition_of_few_gets_the_answer_of_one_without_installs() -> None:
    only_ce = [Install()] * 60
    none, few = (
        exports.document(
            stats_of([*only_ce[n:], *[Install(edition="ee")] * n], Filter(edition="ee"))
        )
        for n in (0, 3)
    )
    assert none == few
    assert none["days"] == []


def test_two_filters_at_once_show_nothing_of_few_that_pass_both() -> None:
    fleet = [
        *[Install("7.0.0", "ce")] * 40,
        *[Install("7.0.0", "ee")] * 2,
        *[Install("7.1.0", "ce")] * 30,
        *[Install("7.1.0", "ee")] * 30,
    ]
    assert stats_of(fleet, Filter("7.0.0")).days
    assert stats_of(fleet, Filter(edition="ee")).days
    assert not stats_of(fleet, Filter("7.0.0", "ee")).days


def test_live_numbers_are_not_shown_under_a_filter() -> None:
    assert stats_of(FLEET).live == LiveStats(AS_OF, 93, 0)
    assert stats_of(FLEET, Filter(edition="ce")).live is None
    assert stats.nothing(Filter(edition="ce"), live=LiveStats(AS_OF, 93, 0)).live is None


def over_a_year(*, known: int) -> Stats:
    """What is shown of the last 30 days of a year, of which so many days were counted."""
    days = [LAST - timedelta(days=n) for n in range(known)]
    numbers = Numbers(
        versions={day: {"7.0.0": 50} for day in days},
        versions_of_all={},
        editions_of_all={},
        releases=[Release("7.0.0", LAST - timedelta(days=300))],
        stocks={day: {ACTIVE_2D: 50} for day in days},
        counted={day: Counted(None) for day in days},
    )
    span = Span(days[-1], LAST, AS_OF)
    return show(stats.nothing(Filter()), numbers, span, days=30)


def test_adoption_is_shown_of_a_year_whatever_the_range() -> None:
    (found,) = over_a_year(known=365).adoption
    assert [day.after for day in found.days] == [*range(91)]


def test_a_month_before_is_shown_from_the_day_on_on_which_it_was_counted() -> None:
    before = [over_a_year(known=known).a_month_before for known in (30, 31)]
    assert before == [None, Before(LAST - timedelta(days=30), 50)]


def test_each_day_is_in_the_csv_once_and_a_share_has_its_own_day() -> None:
    lines = [
        row for row in exports.rows(over_a_year(known=365)) if row[1] in {ACTIVE_2D, "or_newer"}
    ]
    assert len({row[:3] for row in lines}) == len(lines)
    adopted = [row[0] for row in lines if row[1] == "or_newer"]
    first = LAST - timedelta(days=300)
    assert adopted == [str(first + timedelta(days=n)) for n in range(91)]
    assert (str(LAST - timedelta(days=30)), ACTIVE_2D, "", "50", "") in lines


def test_every_feature_has_a_value_that_means_unused() -> None:
    assert {*stats.UNUSED} == {name for name in VALUES if name.startswith("features.")}


def test_every_day_is_shown_in_its_order_and_a_day_without_numbers_is_zero() -> None:
    answer = stats_of([])
    assert [each.day for each in answer.days] == DAYS
    nothing = {**dict.fromkeys(STOCKS, 0), IN_USE: None}
    assert all(each.movements == nothing for each in answer.days)


# The forms.


def test_the_document_has_its_documented_shape() -> None:
    recount = Recount(date(2026, 4, 1), None, LAST)
    document = exports.document(replace(stats_of(FLEET), recount=recount))
    assert [*document] == [
        *("as_of", "since", "until", "version", "edition", "live", "recount", "standby_as_of"),
        *("fold_below", "rounded_to", "days", "a_month_before", "growth", "cohorts", "adoption"),
        *("values", "features", "releases", "all_versions", "all_editions"),
    ]
    assert document["rounded_to"] == document["fold_below"] == 5
    assert document["live"] == {
        "as_of": "2026-05-08T00:01:00+00:00",
        "active": 93,
        "not_established": 0,
    }
    assert document["recount"] == {"since": "2026-04-01", "replayed": None, "until": "2026-05-07"}
    assert document["days"][-1] == {
        "day": "2026-05-07",
        "counted_at": "2026-05-08T00:01:00+00:00",
        "movements": {**dict.fromkeys((ACTIVE_2D, ACTIVE_7D, ACTIVE_30D), 93), IN_USE: 40},
        "dev_builds": 0,
        "versions": {"7.0.0": 40, "7.1.0": 50},
        "other_versions": None,
    }
    assert document["a_month_before"] is None
    assert document["growth"]["by"] == "day"  # no week is over
    assert document["releases"][0] == {"version": "8.0.0-rc.7", "released_on": "2026-05-05"}
    assert document["adoption"][0]["version"] == "7.1.0"
    assert document["adoption"][0]["days"][-1] == {"after": 4, "installs": 50, "of": 95}
    assert document["values"]["edition"] == {
        "groups": [{"value": "ce", "installs": 75}, {"value": "ee", "installs": 20}],
        "folded_installs": None,
        "reported_by": 95,
    }
    assert document["features"]["features.rate_limit_enabled"] == {"installs": 40, "of": 95}


def test_the_csv_says_the_same_as_the_document() -> None:
    silent = [Install("7.1.0", "ce", "docker", "0", ABSENT)] * 6
    lines = {row[:3]: row[3:] for row in exports.rows(stats_of([*FLEET[:-3], *silent]))}
    assert lines["2026-05-07", "active_2d", ""] == ("96", "")
    assert lines["2026-05-07", "dev_builds", ""] == ("0", "")
    assert lines["2026-05-06", "version", "7.1.0"] == ("55", "95")
    assert lines["2026-05-06", "version", OTHER] == ("fewer than 5", "95")
    assert lines["2026-05-07", "features.rate_limit_enabled", "used"] == ("40", "90")
    assert lines["2026-05-07", "platform", OTHER] == ("fewer than 5", "95")
    assert lines["2026-05-08T00:01:00+00:00", "live", "active"] == ("96", "")
    assert lines["2026-05-08T00:01:00+00:00", "live", "not_established"] == ("0", "")
