"""What the page says, and what it draws, of numbers that are made up."""

import re
from dataclasses import replace
from datetime import date, datetime, timedelta

import pytest

from app.collector import phrases, stats
from app.collector.adoption import Adoption, Release, Share
from app.collector.daily import ABSENT, VALUES, Filter
from app.collector.names import OTHER
from app.collector.periods import Cohort, Growth, Period
from app.collector.rendering import Templates
from app.collector.stats import Before, LiveStats, Recount, Stats, counting_stopped
from app.collector.tables import LABELS
from tests.support.collector import SECTIONS
from tests.unit.fleets import AS_OF, FLEET, LAST, Install, stats_of

TEMPLATES = Templates(established_days=30)


def page(answer: Stats) -> str:
    return TEMPLATES.page(answer)


def words(html: str) -> str:
    """What a reader sees outside of the charts."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<svg.*?</svg>", " ", html)))


def section(answer: Stats, name: str) -> str:
    """A section of the page, as HTML."""
    found = re.search(rf'<section id="{name}".*?</section>', page(answer), re.DOTALL)
    assert found
    return found[0]


def answer_of(answer: Stats, name: str) -> str:
    """The sentences that answer a section's question."""
    found = re.search(r'<p class="answer">(.*?)</p>', section(answer, name))
    assert found
    return found[1]


def test_the_page_says_how_many_installs_report_a_field_where_not_all_do() -> None:
    fleet = [
        *[Install("7.0.0", "ce", "docker", "0", "true")] * 1_201,
        *[Install("7.1.0", "ce", ABSENT, "0", ABSENT)] * 300,
        *[Install("7.1.0", "ce", "heroku", ABSENT, "true")] * 3,
    ]
    html = page(stats_of(fleet))
    assert "Deployment (of 1,205 installs that report it)" in html
    assert "Rate limit (of 1,205 installs that report it)" in html
    assert "Organisations (of 1,500 installs that report it)" in html
    assert "Edition (of" not in html


def test_the_page_says_of_which_moment_its_numbers_are() -> None:
    said = words(page(stats_of(FLEET)))
    assert "93 installs were active at the end of 7 May 2026." in said
    assert "Live, on 8 May 2026 at 00:01 UTC: 93 installs are active, and 0 more" in said
    assert "This is a floor, not a census" in said


def test_the_first_figures_are_the_active_ones_those_in_use_and_those_not_established() -> None:
    said = words(page(stats_of([*FLEET, *[Install(comes=0, leaves=5)] * 9])))
    assert "active 93 reported within 48 hours" in said
    assert "in use 42% of the active installs report a consent" in said
    assert "not established yet 9 live: reported on too few days so far" in said


def test_the_share_in_use_is_of_the_rounded_number_of_active_installs() -> None:
    said = words(page(stats_of([*[Install(bucket="1-10")] * 7, *[Install()] * 6])))
    assert "in use 33% of the active installs report a consent" in said


def before(active: int | None) -> Stats:
    """A fleet of 93, and how many were active a month before."""
    return replace(stats_of(FLEET), a_month_before=Before(LAST - timedelta(days=30), active))


@pytest.mark.parametrize(
    ("active", "headline", "verdict", "figure"),
    [
        (85, ", 8 more than on 7 April.", "Yes: +8 (+9%)", "+8 (+9%)"),
        (186, ", 93 fewer than on 7 April.", "No: \N{MINUS SIGN}93", "\N{MINUS SIGN}93"),
        (0, ", 93 more than on 7 April.", "Yes: +93 active installs in 30 days.", "+93</dd>"),
        (
            97,
            "at the end of 7 May 2026.",
            "No clear change: 93 active, and 97 30",
            "no clear change",
        ),
        (
            89,
            "at the end of 7 May 2026.",
            "No clear change: 93 active, and 89 30",
            "no clear change",
        ),
        (
            None,
            "at the end of 7 May 2026.",
            "Yes: from fewer than 5 active installs to 93",
            "\N{EN DASH}",
        ),
    ],
)
def test_growth_is_the_change_in_30_days_and_a_change_below_5_is_not_shown(
    active: int | None, headline: str, verdict: str, figure: str
) -> None:
    answer = before(active)
    assert answer_of(answer, "active").endswith(headline)
    assert answer_of(answer, "growth").startswith(verdict)
    assert re.search(
        rf'<dt>in 30 days</dt><dd class="number[ few]*">{re.escape(figure)}',
        section(answer, "active"),
    )
    assert ('class="up"' in section(answer, "active")) == figure.startswith("+")


def test_a_change_of_less_than_one_percent_is_no_growth() -> None:
    answer = before(85)
    movements: dict[str, int | None] = dict.fromkeys(answer.days[-1].movements, 60_300)
    days = [*answer.days[:-1], replace(answer.days[-1], movements=movements)]
    for was, verdict in ((60_000, "No clear change: 60,300 active"), (59_000, "Yes: +1,300 (+2%)")):
        month = Before(LAST - timedelta(days=30), was)
        larger = replace(answer, days=days, a_month_before=month)
        assert answer_of(larger, "growth").startswith(verdict)
    assert "+300 (&lt;1%)" in section(
        replace(larger, a_month_before=replace(month, active=60_000)), "active"
    )


def test_without_a_day_30_days_before_the_page_says_that_growth_is_not_known() -> None:
    said = section(stats_of(FLEET), "active")
    assert "not counted 30 days before" in said
    assert answer_of(stats_of(FLEET), "growth").startswith("Not known yet")


WEEKS = Growth(
    "week",
    [
        Period(date(2026, 4, 20), date(2026, 4, 26), 25, None),
        Period(date(2026, 4, 27), date(2026, 5, 3), 40, 10),
    ],
)
MONTHS = Growth("month", [Period(date(2026, 4, 1), date(2026, 4, 30), 15, 5)])


def test_growth_is_drawn_by_period_and_listed_with_the_latest_first() -> None:
    answer = replace(before(85), growth=WEEKS)
    html = section(answer, "growth")
    last = "In the week from 27 April to 3 May 2026, 40 were new, and 10 were lost."
    assert answer_of(answer, "growth").endswith(last)
    assert "Show the numbers by week" in html
    assert re.findall(r'<tr><th scope="row">([^<]*)<td>([^<]*)<td>([^<\n]*)', html) == [
        ("2026-04-27", "40", "10"),
        ("2026-04-20", "25", "fewer than 5"),
    ]
    assert html.count("<label>") == 2
    assert "In the week from 20 to 26 April 2026: new 25; lost fewer than 5" in html
    assert "Grey marks are numbers below 5." in html
    monthly = section(replace(answer, growth=MONTHS), "growth")
    assert "In April 2026, 15 were new, and 5 were lost." in monthly
    assert "Grey marks" not in monthly


def test_the_larger_side_of_growth_has_the_larger_part_of_the_chart() -> None:
    html = section(replace(before(85), growth=WEEKS), "growth")
    ticks = re.findall(r'<text class="y" y="([\d.]+)"[^>]*>([^<]*)', html)
    assert ticks == [("200.0", "10"), ("160.0", "0")] + [
        (f"{160 - 40 * n:.1f}", f"{10 * n}") for n in range(1, 5)
    ]


COHORTS = [
    Cohort(date(2025, 12, 1), 80, {"30": 60, "90": 40}),
    Cohort(date(2026, 1, 1), 40, {"30": 30, "90": None}),
    Cohort(date(2026, 2, 1), 50, {"30": 25}),
    Cohort(date(2026, 3, 1), None, {"30": None}),
]


def test_the_page_shows_how_many_of_a_month_stay_for_30_and_90_days() -> None:
    answer = replace(stats_of(FLEET), cohorts=COHORTS)
    assert answer_of(answer, "retention") == (
        "Of the 50 installs established in February 2026, 25 (50%) were active 30 days later; of"
        " the 40 installs established in January 2026, fewer than 5 were active 90 days later."
    )
    rows = section(answer, "retention")
    lines = re.findall(r'<tr><th scope="row">([^<]*)((?:<td>[^<\n]*)*)', rows)
    shown = [(month, cells.replace("\xa0", " ").split("<td>")[1:]) for month, cells in lines]
    assert shown == [
        ("2026-03", ["fewer than 5", "fewer than 5", "not yet"]),
        ("2026-02", ["50", "25 (50%)", "not yet"]),
        ("2026-01", ["40", "30", "fewer than 5"]),
        ("2025-12", ["80", "60 (75%)", "40 (50%)"]),
    ]


def test_a_month_of_which_hardly_anybody_stayed_is_shown() -> None:
    answer = replace(stats_of(FLEET), cohorts=[Cohort(date(2026, 2, 1), 40, {"30": None})])
    assert answer_of(answer, "retention") == (
        "Of the 40 installs established in February 2026, fewer than 5 were active 30 days later."
    )


def test_what_was_not_counted_of_a_month_is_not_shown_as_zero() -> None:
    answer = replace(stats_of(FLEET), cohorts=[replace(COHORTS[0], retained={"30": 30})])
    assert "<td>not counted" in section(answer, "retention")


def test_90_days_of_a_month_are_not_over_until_those_of_its_last_day_are() -> None:
    january = [Cohort(date(2026, 1, 1), 50, {"30": 25})]
    for until, said in ((date(2026, 4, 30), "not yet"), (date(2026, 5, 1), "not counted")):
        answer = replace(stats_of(FLEET), cohorts=january, until=until)
        assert f"<td>{said}" in section(answer, "retention")


def test_the_latest_month_is_the_answer() -> None:
    months = [Cohort(date(2026, month, 1), 50, {"30": 25, "90": 20 + month}) for month in (1, 2)]
    said = answer_of(replace(stats_of(FLEET), cohorts=months), "retention")
    assert said.count("February 2026") == 2
    assert "22 (44%)" in said


def test_retention_is_not_shown_for_a_version() -> None:
    said = answer_of(stats_of(FLEET, Filter("7.1.0")), "retention")
    assert said.startswith("Installs move on to other versions")
    none = answer_of(stats_of(FLEET), "retention")
    assert none == "No month with 5 or more new installs has been over for 30 days yet."


def test_versions_are_listed_with_the_newest_first_and_added_up_to_what_must_be_supported() -> None:
    fleet = [*[Install("7.0.0")] * 10, *[Install("7.1.0")] * 60, *[Install(OTHER)] * 30]
    html = section(stats_of(fleet), "versions")
    rows = re.findall(r'<th scope="row">([^<]*)(?: <span class="when">([^<]*)</span>)?<td', html)
    assert rows == [
        ("7.1.0", "2026-05-03"),
        ("7.0.0", "2026-04-02"),
        ("other (not listed, or fewer than 5)", ""),
    ]
    assert re.findall(r'<td class="n">(\d+%)\n', html) == ["60%", "70%"]
    assert answer_of(stats_of(fleet), "versions") == (
        "7.0.0 or newer: 70% of the active installs. The version of 30% is not shown."
    )
    few = [*[Install("7.0.0")] * 5, *[Install("7.1.0")] * 95]
    assert answer_of(stats_of(few), "versions") == "7.1.0 or newer: 95% of the active installs."


def test_the_version_that_is_the_answer_is_shown_at_once() -> None:
    shown = stats_of(FLEET)
    last = replace(shown.days[-1], versions={f"1.{minor}.0": 10 for minor in range(30)})
    answer = replace(shown, days=[*shown.days[:-1], last])
    assert answer_of(answer, "versions").startswith("1.3.0 or newer: 90%")
    at_once, more = section(answer, "versions").split("<summary>Show 19 more</summary>")
    assert [f'"row">1.{minor}.0<' in at_once for minor in (29, 20, 19, 3)] == [
        True,
        True,
        False,
        True,
    ]
    assert '"row">1.3.0<' not in more


def test_a_fall_to_few_is_no_growth() -> None:
    few = stats_of([Install()] * 3)
    answer = replace(few, a_month_before=Before(LAST - timedelta(days=30), 93))
    said = "No: from 93 active installs to fewer than 5 in 30 days."
    assert answer_of(answer, "growth").startswith(said)
    nobody = replace(few, a_month_before=Before(LAST - timedelta(days=30), None))
    assert answer_of(nobody, "growth").startswith("There are too few installs")


def test_under_a_filter_a_change_that_rounding_can_make_is_no_growth() -> None:
    filtered = stats_of(FLEET, Filter(edition="ce"))
    for was, verdict in ((70, "No clear change"), (65, "Yes: +10 (+15%)")):
        answer = replace(filtered, a_month_before=Before(LAST - timedelta(days=30), was))
        assert answer_of(answer, "growth").startswith(verdict)
    assert answer_of(answer, "active").startswith("About 75 installs in the ce edition were active")


def test_of_features_that_few_use_it_is_said_how_many_there_are() -> None:
    fleet = [*[Install(flag="true")] * 20, *[Install(bucket="1-10", flag="true")] * 3]
    said = answer_of(stats_of(fleet), "features")
    assert said.endswith("; three features are used by fewer than 5 each.")


def test_adoption_is_drawn_by_days_since_each_release() -> None:
    first, second = (Release(version, LAST) for version in ("7.1.0", "7.0.0"))
    answer = replace(
        stats_of(FLEET),
        adoption=[
            Adoption(*first, [Share(1, 10, 100), Share(2, 20, 100)]),
            Adoption(*second, [Share(0, 10, 100), Share(2, 60, 100), Share(3, 70, 100)]),
        ],
    )
    html = section(answer, "adoption")
    assert answer_of(answer, "adoption") == (
        "7.1.0 or newer ran on 20% of the active installs two days after its release. 7.0.0 or"
        " newer ran on half of them after two days."
    )
    assert "7.1.0 or newer <b>20%</b>" in html
    assert "2 days after: 7.1.0 or newer 20%; 7.0.0 or newer 60%" in html
    assert "3 days after: 7.0.0 or newer 70%" in html
    assert "1 day after: 7.1.0 or newer 10%; 7.0.0 or newer –" in html  # noqa: RUF001 - what the page says
    paths = dict(re.findall(r'<path class="(m\d)" d="(M\d[^"]*)"/>\n', html))
    assert paths["m0"].count("L") == 1  # two days
    assert paths["m1"].count("M") == 2  # a day is missing


def test_how_fast_half_was_reached_is_not_said_where_counting_began_later() -> None:
    release = Release("7.0.0", LAST)
    began_late = Adoption(*release, [Share(10, 60, 100), Share(11, 60, 100)])
    said = answer_of(replace(stats_of(FLEET), adoption=[began_late]), "adoption")
    assert said == "7.0.0 or newer ran on 60% of the active installs 11 days after its release."


def test_an_edition_that_is_chosen_is_no_answer_to_where_it_runs() -> None:
    everyone, some = stats_of(FLEET), stats_of(FLEET, Filter(edition="ce"))
    assert "edition" in answer_of(everyone, "where")
    assert "edition" not in answer_of(some, "where")


def test_the_last_tick_below_a_chart_is_never_left_out() -> None:
    months = [date(2025, month, 1) for month in range(1, 13)]
    year = Growth("month", [Period(day, day, 10, 5) for day in months])
    html = section(replace(before(85), growth=year), "growth")
    ticks = re.findall(r'<text class="x ([\w ]+)"[^>]*>([^<]*)', html)
    assert ticks[-1] == ("last", "Dec")
    assert [words for role, words in ticks if "minor" not in role] == ["Apr", "Aug", "Dec"]


def test_the_page_lists_the_last_notable_days_of_all_installs() -> None:
    days = stats_of(FLEET).days
    early, late = ({"7.0.0": 90, "7.1.0": n} for n in (5, 50))
    risen = [
        *(replace(each, versions=early) for each in days[:-1]),
        replace(days[-1], versions=late),
    ]
    html = section(replace(stats_of(FLEET), days=risen), "active")
    assert '<time datetime="2026-05-07">2026-05-07</time> 7.1.0 reached 10%' in html
    assert "Notable days" not in section(stats_of(FLEET, Filter(edition="ce")), "active")


def test_what_all_but_few_use_is_the_most_used_feature_under_a_filter() -> None:
    fleet = [
        *[Install(edition="ee", bucket="1-10", flag="true")] * 60,
        *[Install(edition="ee", bucket="0", flag="true")] * 3,
        *[Install()] * 30,
    ]
    html = section(stats_of(fleet, Filter(edition="ee")), "features")
    name, width, installs = re.findall(
        r'<th scope="row">([^<]*)<td.*?([\d.]+)%" height="12" rx="2"/></svg><td class="n">(\d+)',
        html,
    )[0]
    assert (width, installs) == ("100.0", "65")
    said = answer_of(stats_of(fleet, Filter(edition="ee")), "features")
    assert said.startswith(f"Most used is “{name}” (100%)")


def test_more_than_ten_lines_of_a_table_are_shown_only_when_a_reader_asks() -> None:
    answer = stats_of(FLEET)
    groups = [replace(answer.values["deployment"].groups[0], value=f"d{n}") for n in range(50)]
    many = replace(answer.values["deployment"], groups=groups, folded_installs=20)
    html = section(replace(answer, values={**answer.values, "deployment": many}), "where")
    shown, more = html.split("<summary>Show 40 more</summary>")
    assert [f"d{n}<td" in shown for n in (0, 9, 10)] == [True, True, False]
    assert [f"d{n}<td" in more for n in (9, 10, 49)] == [False, True, True]
    assert "other (not listed, or fewer than 5)" in shown
    assert "Deployment, continued" in more


def test_of_few_installs_nothing_is_drawn_that_could_be_read_as_zero() -> None:
    html = page(stats_of([Install()] * 3))
    assert 'class="chart"' not in html
    assert "Fewer than 5 installs were active" in html
    assert "Versions, deployments, sizes and features are shown from 5 active installs on." in html


def test_an_axis_of_large_numbers_has_short_words() -> None:
    days = [
        replace(day, movements=dict.fromkeys(day.movements, 61_234)) for day in stats_of(FLEET).days
    ]
    html = section(replace(stats_of(FLEET), days=days), "active")
    assert re.findall(r'<text class="y"[^>]*>([^<]*)', html) == ["0", "25k", "50k", "75k"]


def test_what_is_not_listed_is_named_so_on_the_page() -> None:
    said = words(page(stats_of([*FLEET, *[Install(word=OTHER)] * 30])))
    assert "other (not listed, or fewer than 5)" in said
    few = [Install(bucket=bucket) for bucket in ("1-10", "10-100", "10k+") for _ in range(3)]
    assert "all others" in words(page(stats_of([*[Install(bucket="0")] * 40, *few])))


@pytest.mark.parametrize(
    ("now", "still"),
    [
        ("2026-05-08T00:01", False),
        ("2026-05-09T00:59", False),
        ("2026-05-09T01:00", True),
        ("2026-06-09T00:00", True),
    ],
)
def test_counting_has_stopped_when_a_day_is_not_counted_an_hour_after_its_end(
    now: str,
    still: bool,  # noqa: FBT001 - pytest's parameter
) -> None:
    assert counting_stopped(LAST, datetime.fromisoformat(f"{now}:00+00:00")) is still
    said = words(TEMPLATES.page(stats_of(FLEET), counting_stopped=still))
    sentence = "Counting has stopped: the last day that was counted is 7 May 2026."
    assert (sentence in said) is still


def test_the_page_says_how_far_a_recount_has_come() -> None:
    recount = Recount(date(2026, 4, 1), date(2026, 3, 24), LAST)
    said = words(page(replace(stats_of(FLEET), recount=recount)))
    assert "Earlier days are being counted again: 35% done." in said
    assert "some numbers of 1 April to 7 May 2026" in said
    assert "being counted again" not in words(page(stats_of(FLEET)))


def test_before_the_first_day_is_counted_the_page_says_what_is_there() -> None:
    live = LiveStats(AS_OF, 0, 12)
    said = words(page(stats.nothing(Filter(), live=live)))
    assert "No day has been counted yet" in said
    assert "and 12 more are not established yet." in said
    assert "A day is counted after its end" in said
    nobody = words(page(stats.nothing(Filter(), live=LiveStats(AS_OF, 0, 0))))
    assert "No install has reported yet" in nobody


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (1, "An install is established after its first heartbeat."),
        (3, "An install is established after heartbeats on three different days."),
    ],
)
def test_the_page_says_when_an_install_counts(days: int, said: str) -> None:
    assert said in Templates(established_days=days).page(stats_of(FLEET))


def test_every_field_that_is_counted_has_a_label_on_the_page() -> None:
    missing = {"version", "edition", *VALUES} - LABELS.keys()
    assert not missing, f"name {', '.join(missing)} in LABELS of app/collector/tables.py"
    assert not LABELS.keys() - {"version", "edition", *VALUES}


def test_each_section_has_a_link_of_its_own() -> None:
    html = page(stats_of(FLEET))
    names = re.findall(r'<section id="(\w+)" aria-labelledby', html)
    assert names == [*SECTIONS, "about", "reuse"]
    assert re.findall(r'<a class="permalink" href="#(\w+)">', html) == names


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
def test_only_a_share_of_nothing_is_0_percent_and_only_all_is_100_percent(
    part: int, whole_of_it: int, said: str
) -> None:
    assert phrases.percent(part, whole_of_it) == said
