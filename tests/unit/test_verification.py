"""What is wrong with the rows, with a log compared with them, and with a body."""

import json
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.holding import Holding
from app.logfile import Logged, TooLong, Unreadable
from app.payload import NEWEST, SCHEMA_VERSION, fault, fields, parse
from app.verification import Confirmed, Here, Problem, There, of_log, of_receiver, of_rows
from tests.support.published import EXAMPLE, with_value

BODY = parse(EXAMPLE).canonical()
DAY, NEXT_DAY = date(2026, 5, 2), date(2026, 5, 3)
ID = UUID(int=7)
FIELDS = [name for name, _ in fields()]


def written_at(moment: str) -> str:
    return NEWEST.model_validate(with_value("sent_at", f"{moment}+00:00")).canonical()


def row(state: str, *outcomes: str | None, body: str = BODY) -> dict[str, Any]:
    tries = [{"n": n, "outcome": outcome} for n, outcome in enumerate(outcomes, start=1)]
    return {"id": ID, "day": DAY, "payload": body, "state": state, "tries": tries}


def reported(problems: Iterable[Problem]) -> list[tuple[str, int | None, UUID | None]]:
    return [(problem.sentence, problem.line, problem.id) for problem in problems]


class TestSinceADay:
    @pytest.mark.parametrize(
        ("moment", "counts"),
        [
            ("2026-05-02T02:30:00", False),
            ("2026-05-03T02:29:59", False),
            ("2026-05-03T02:30:00", True),
            ("2026-06-01T00:00:00", True),
        ],
    )
    def test_a_body_counts_by_the_half_past_two_that_it_belongs_to(
        self, moment: str, *, counts: bool
    ) -> None:
        body = Logged(written_at(moment), 1)
        assert of_log([], [body], since=NEXT_DAY).logged == counts

    @pytest.mark.parametrize("body", ["", "{}", BODY[:-1], f"{BODY} ", BODY.replace("1-10", "7")])
    def test_a_body_that_cannot_be_trusted_to_say_when_always_counts(self, body: str) -> None:
        assert of_log([], [Logged(body, 1)], since=NEXT_DAY).logged == 1


NOT_STORED = "the log has a body that is not stored"
NOT_WHOLE = "the log has a body in this line that cannot be read: it is not a whole JSON object"
NOT_LOGGED = "it was sent, but the log does not have its body"
NOT_READ = f"{NOT_LOGGED} in the readable lines"


class TestTheOutboxBesideALog:
    def test_agrees_where_what_was_sent_was_logged_once_or_twice(self) -> None:
        rows = [row("sent", "sent"), row("pending", body="never left")]
        compared = of_log(rows, [Logged(BODY, 1), Logged(BODY, 2)])
        assert (compared.problems, compared.logged) == ([], 2)

    @pytest.mark.parametrize(
        "outcomes", [("sent",), ("retryable", "sent"), ("sent", None), ("sent", "rejected")]
    )
    @pytest.mark.parametrize("state", ["pending", "sending", "sent", "expired", "discarded"])
    def test_misses_what_has_left_whatever_became_of_the_row(
        self, state: str, outcomes: tuple[str | None, ...]
    ) -> None:
        assert reported(of_log([row(state, *outcomes)], []).problems) == [(NOT_LOGGED, None, ID)]

    @pytest.mark.parametrize("outcome", ["retryable", "rejected", None])
    def test_misses_nothing_that_was_not_accepted(self, outcome: str | None) -> None:
        assert of_log([row("expired", outcome)], []).problems == []

    @given(st.integers(0, len(BODY) - 1), st.characters(codec="ascii"))
    def test_notices_one_character_that_is_another(self, place: int, other: str) -> None:
        changed = BODY[:place] + other + BODY[place + 1 :]
        problems = reported(of_log([row("rejected", "rejected")], [Logged(changed, 9)]).problems)
        expected = [[]] if changed == BODY else [[(NOT_STORED, 9, None)], [(NOT_WHOLE, 9, None)]]
        assert problems in expected

    @pytest.mark.parametrize("place", [0, 1, 300, len(BODY) - 1])
    def test_joins_a_body_that_was_split_into_two_lines(self, place: int) -> None:
        split = Logged(BODY[:place], 9, following=f"02:30:01 worker | {BODY[place:]}")
        assert of_log([row("sent", "sent")], [split]).problems == []

    @pytest.mark.parametrize(
        "following", ["", "another line", f"{BODY[300:]} ", f"telemetry.payload {BODY}"]
    )
    def test_joins_nothing_else_and_does_not_accuse_the_row(self, following: str) -> None:
        split = Logged(BODY[:300], 9, following)
        assert reported(of_log([row("sent", "sent")], [split]).problems) == [
            (NOT_WHOLE, 9, None),
            (NOT_READ, None, ID),
        ]

    def test_says_what_cannot_be_read_and_does_not_accuse_the_row(self) -> None:
        compared = of_log([row("sent", "sent")], [Unreadable(7, "of a reason")])
        unread = "the log has a body in this line that cannot be read: of a reason"
        assert reported(compared.problems) == [(unread, 7, None), (NOT_READ, None, ID)]

    def test_skips_a_line_that_is_too_long_to_hold_a_body(self) -> None:
        compared = of_log([row("sent", "sent")], [TooLong(3), Logged(BODY, 4)])
        assert (compared.problems, compared.too_long) == ([], [3])
        assert reported(of_log([row("sent", "sent")], [TooLong(3)]).problems) == [
            (NOT_READ, None, ID)
        ]


INSTANCE = UUID(json.loads(BODY)["instance_id"])
SENT_AT = json.loads(BODY)["sent_at"]
CHANGED = BODY.replace('"sites":"10-100"', '"sites":"1-10"')
HERE, ELSEWHERE = "https://here.example/v1/heartbeat", "https://elsewhere.example/v1/heartbeat"
NOW = datetime(2026, 5, 3, tzinfo=UTC)
OTHER_BYTES = "the receiver holds different bytes under its id and time"
NOT_THERE = "it was sent, and the receiver does not hold it: "
NOT_HERE = f"the receiver holds a heartbeat of {SENT_AT} that is not stored here: "


def stored(state: str = "sent", *, body: str = BODY, endpoint: str = HERE) -> dict[str, Any]:
    outcome = state if state in {"sent", "rejected"} else None
    found = row(state, outcome, body=body)
    for each in found["tries"]:
        each["endpoint"] = endpoint
    return {**found, "instance_id": INSTANCE, "created_at": datetime.fromisoformat(SENT_AT)}


def there(bodies: dict[str, str], *, sent: bool = True, retention_days: int = 400) -> There:
    return There(HERE, {INSTANCE: Holding(retention_days, bodies)}, {ID} if sent else set())


def compared(
    rows: list[dict[str, Any]], held: There, here: Here | None = None
) -> tuple[dict[str, int], list[str]]:
    """Return the counts that are not 0, and the sentences."""
    found, problems = of_receiver(rows, held, here or Here(NOW))
    assert isinstance(found, Confirmed)
    assert (found.endpoint, found.ids) == (HERE, [INSTANCE])
    counts = {name: value for name, value in vars(found).items() if isinstance(value, int)}
    return {name: n for name, n in counts.items() if n}, [each.sentence for each in problems]


class TestTheOutboxBesideTheReceiver:
    def test_agrees_where_the_receiver_holds_what_was_sent(self) -> None:
        assert compared([stored()], there({SENT_AT: BODY})) == ({"sent": 1, "equal": 1}, [])

    @pytest.mark.parametrize("state", ["pending", "sending", "expired", "discarded", "rejected"])
    def test_takes_a_row_that_was_not_sent_and_is_there_all_the_same_for_an_equal_one(
        self, state: str
    ) -> None:
        counts = {"equal": 1, "equal_unsent": 1}
        assert compared([stored(state)], there({SENT_AT: BODY}, sent=False)) == (counts, [])

    @pytest.mark.parametrize("state", ["pending", "sending", "expired", "discarded", "rejected"])
    def test_does_not_miss_a_row_that_was_not_sent(self, state: str) -> None:
        assert compared([stored(state)], there({}, sent=False)) == ({}, [])

    def test_does_not_miss_a_row_that_was_sent_after_the_receiver_was_asked(self) -> None:
        assert compared([stored()], there({}, sent=False)) == ({}, [])

    def test_misses_what_was_sent_and_gives_the_reasons_that_are_possible(self) -> None:
        counts = {"sent": 1, "missing": 1}
        deleted, went = (
            "it was deleted there",
            "it was sent to another endpoint, shown in its attempt",
        )
        assert compared([stored()], there({})) == (counts, [f"{NOT_THERE}{deleted}"])
        elsewhere = [stored(endpoint=ELSEWHERE)]
        assert compared(elsewhere, there({})) == (
            counts,
            [f"{NOT_THERE}{went}, or {deleted}"],
        )
        (sentence,) = compared(elsewhere, there({}, retention_days=400), Here(NOW.replace(2028)))[1]
        old = "it is older than the 400 days for which the receiver stores it"
        assert sentence == f"{NOT_THERE}{went}, {old}, or {deleted}"
        (sentence,) = compared([stored()], there({}, retention_days=0), Here(NOW.replace(2028)))[1]
        assert sentence == f"{NOT_THERE}{deleted}"

    @pytest.mark.parametrize(
        ("logged", "ending"),
        [
            (None, ": the row or the receiver's copy was changed"),
            ({BODY}, "; the row and the log have the same bytes: the receiver's was changed"),
            ({CHANGED}, "; the receiver and the log have the same bytes: the row was changed"),
            (set(), ": the row or the receiver's copy was changed"),
            ({BODY, CHANGED}, ": the row or the receiver's copy was changed"),
        ],
        ids=["no log", "with the row", "with the receiver", "with neither", "with both"],
    )
    def test_says_which_of_the_three_differs_from_the_other_two(
        self, logged: set[str] | None, ending: str
    ) -> None:
        found = compared([stored()], there({SENT_AT: CHANGED}), Here(NOW, logged=logged))
        assert found == ({"sent": 1, "different": 1}, [f"{OTHER_BYTES}{ending}"])

    @given(st.integers(0, len(BODY) - 1), st.characters())
    def test_notices_one_character_that_is_another(self, place: int, other: str) -> None:
        changed = BODY[:place] + other + BODY[place + 1 :]
        counts, sentences = compared([stored()], there({SENT_AT: changed}))
        assert counts.get("different", 0) == len(sentences) == (changed != BODY)

    @pytest.mark.parametrize("other", [f"{BODY} ", f"{BODY}\n", BODY.replace(":", ": ", 1)])
    def test_takes_bytes_that_only_mean_the_same_for_other_ones(self, other: str) -> None:
        assert compared([stored()], there({SENT_AT: other}))[0] == {"sent": 1, "different": 1}

    def test_says_that_the_log_has_what_the_receiver_lacks(self) -> None:
        (sentence,) = compared([stored()], there({}), Here(NOW, logged={BODY}))[1]
        assert sentence.startswith("it was sent, which the log confirms, and the receiver does not")

    def test_reports_what_is_there_and_not_here_with_the_reasons_that_are_possible(self) -> None:
        counts, (sentence,) = compared([], there({SENT_AT: BODY}))
        assert counts == {"only_there": 1}
        assert sentence == (
            f"{NOT_HERE}this database was restored from a backup, ConsentOS's own telemetry sent"
            " it under the same id, or somebody else uses this id"
        )
        (sentence,) = compared([], there({SENT_AT: BODY}), Here(NOW, logged={BODY}))[1]
        assert sentence.endswith(
            "the log has the same bytes, so it was sent from here and its row is gone"
        )

    def test_expects_nothing_here_that_is_older_than_rows_are_kept_or_before_the_day(self) -> None:
        held = there({SENT_AT: BODY})
        week = timedelta(days=7)
        late = Here(NOW + week, retention=week)
        assert compared([], held, late) == ({"no_longer_here": 1}, [])
        assert compared([], held, Here(NOW, retention=week))[0] == {"only_there": 1}
        assert compared([], held, Here(NOW, since=NEXT_DAY)) == ({}, [])
        assert compared([], held, Here(NOW, since=DAY))[0] == {"only_there": 1}

    @pytest.mark.parametrize("year", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"])
    def test_survives_any_time_that_a_stranger_may_name(self, year: str) -> None:
        for here in (Here(NOW), Here(NOW, since=date.min), Here(NOW, timedelta(days=36_500))):
            counts, _ = compared([], there({year: BODY}), here)
            assert sum(counts.values()) <= 1


class TestALogBesideTheReceiver:
    def test_says_whether_the_receiver_holds_a_body_that_is_not_stored(self) -> None:
        for held, ending in (({BODY}, "holds it"), (set(), "does not hold it either")):
            problems = of_log([], [Logged(BODY, 4)], held=held).problems
            assert reported(problems) == [(f"{NOT_STORED}; the receiver {ending}", 4, None)]

    def test_says_that_the_receiver_holds_a_row_that_was_not_logged(self) -> None:
        rows = [row("sent", "sent")]
        held = reported(of_log(rows, [], held={BODY}).problems)
        assert held == [(f"{NOT_LOGGED}; the receiver holds the row's bytes", None, ID)]
        assert reported(of_log(rows, [], held=set()).problems) == [(NOT_LOGGED, None, ID)]


class TestABodyIsWithoutFault:
    def test_as_the_schema_writes_it(self) -> None:
        assert fault(BODY) is None

    @pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, True, 1.0, "1", None, [1], {}])
    def test_only_under_a_version_that_is_known_here(self, version: object) -> None:
        body = json.dumps(with_value("telemetry_schema", version), separators=(",", ":"))
        assert fault(body) == "its body has an unknown telemetry_schema"

    @pytest.mark.parametrize("body", ["", "{", "{}", "[]", "[1]", '"a"', "1", "null", "NaN"])
    def test_only_as_an_object_that_names_its_version(self, body: str) -> None:
        assert fault(body) == "its body is not a JSON object with a telemetry_schema"

    @pytest.mark.parametrize(
        "body",
        [
            f" {BODY}",
            f"{BODY}\n",
            BODY.replace(",", ", ", 1),
            BODY.replace('"ce"', '"\\u0063e"'),
            BODY.replace("{", '{"version":"9.9.9",', 1),
            json.dumps(dict(reversed(json.loads(BODY).items())), separators=(",", ":")),
        ],
    )
    def test_only_in_the_canonical_form(self, body: str) -> None:
        assert json.loads(body)["telemetry_schema"] == SCHEMA_VERSION
        assert fault(body) == "its body is not in canonical form"

    @pytest.mark.parametrize("name", FIELDS[1:])
    @pytest.mark.parametrize("value", [12_345, "somebody@example.com"])
    def test_only_without_a_raw_number_or_free_text_which_are_not_repeated(
        self, name: str, value: object
    ) -> None:
        sentence = fault(json.dumps(with_value(name, value)))
        assert sentence
        assert sentence.startswith(f"its body does not match schema {SCHEMA_VERSION}: {name} (")
        assert str(value) not in sentence

    @pytest.mark.parametrize("section", ["", "counts.", "features.", "stack."])
    def test_only_without_an_unknown_field(self, section: str) -> None:
        sentence = fault(json.dumps(with_value(f"{section}domains", "0")))
        assert sentence
        assert sentence.startswith(f"its body does not match schema {SCHEMA_VERSION}: ")
        assert "extra_forbidden" in sentence

    @given(st.text() | st.recursive(st.none(), st.lists).map(json.dumps))
    def test_and_whatever_it_is_the_answer_is_a_sentence(self, body: str) -> None:
        assert fault(body)

    def test_that_does_not_repeat_a_name_that_could_forge_a_line(self) -> None:
        body = '{"telemetry_schema":1,"a\\nNo problem, says acme.example":1}'
        reported = fault(body)
        assert reported
        assert reported.isprintable()

    def test_that_is_reported_for_a_body_of_any_depth(self) -> None:
        assert fault("[" * 200_000) == "its body is not a JSON object with a telemetry_schema"


GOOD = {
    **row("sent", None, "retryable", "sent"),
    "instance_id": UUID(json.loads(BODY)["instance_id"]),
    "created_at": datetime.fromisoformat("2026-05-02T04:30:00.999+02:00"),
    "attempts": 3,
}


def test_a_row_and_its_attempts_that_belong_together_have_no_problem() -> None:
    assert list(of_rows([GOOD])) == []


def test_a_row_for_a_day_on_which_it_was_not_written_is_a_problem() -> None:
    (problem,) = of_rows([{**GOOD, "day": NEXT_DAY}])
    assert problem.sentence == "it was written on a different day than the row's day"
