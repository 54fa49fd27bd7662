"""What is wrong with the rows, with a log compared with them, and with a body."""

import json
from collections.abc import Iterable
from datetime import date, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.logfile import Logged, TooLong, Unreadable
from app.payload import NEWEST, SCHEMA_VERSION, fault, fields, parse
from app.verification import Problem, of_log, of_rows
from tests.unit.published import EXAMPLE, with_value

BODY = parse(EXAMPLE).canonical()
DAY, NEXT_DAY = date(2026, 5, 2), date(2026, 5, 3)
ID = UUID(int=7)
FIELDS = [name for name, _ in fields()]


def written_at(moment: str) -> str:
    return NEWEST.model_validate(with_value("sent_at", f"{moment}+00:00")).canonical()


def row(state: str, *outcomes: str | None, body: str = BODY) -> dict[str, Any]:
    tries = [{"n": n, "outcome": outcome} for n, outcome in enumerate(outcomes, start=1)]
    return {"id": ID, "day": DAY, "payload": body, "state": state, "tries": tries}


def told(problems: Iterable[Problem]) -> list[tuple[str, int | None, UUID | None]]:
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
NOT_WHOLE = "the log has a body here that cannot be read: it is not a whole JSON object"
NOT_LOGGED = "it was sent, and the log has no such body"
NOT_READ = f"{NOT_LOGGED} in the lines that can be read"


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
        assert told(of_log([row(state, *outcomes)], []).problems) == [(NOT_LOGGED, None, ID)]

    @pytest.mark.parametrize("outcome", ["retryable", "rejected", None])
    def test_misses_nothing_that_was_not_accepted(self, outcome: str | None) -> None:
        assert of_log([row("expired", outcome)], []).problems == []

    @given(st.integers(0, len(BODY) - 1), st.characters(codec="ascii"))
    def test_notices_one_character_that_is_another(self, place: int, other: str) -> None:
        changed = BODY[:place] + other + BODY[place + 1 :]
        problems = told(of_log([row("rejected", "rejected")], [Logged(changed, 9)]).problems)
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
        assert told(of_log([row("sent", "sent")], [split]).problems) == [
            (NOT_WHOLE, 9, None),
            (NOT_READ, None, ID),
        ]

    def test_says_what_cannot_be_read_and_does_not_accuse_the_row(self) -> None:
        compared = of_log([row("sent", "sent")], [Unreadable(7, "of a reason")])
        unread = "the log has a body here that cannot be read: of a reason"
        assert told(compared.problems) == [(unread, 7, None), (NOT_READ, None, ID)]

    def test_skips_a_line_that_is_too_long_to_hold_a_body(self) -> None:
        compared = of_log([row("sent", "sent")], [TooLong(3), Logged(BODY, 4)])
        assert (compared.problems, compared.too_long) == ([], [3])
        assert told(of_log([row("sent", "sent")], [TooLong(3)]).problems) == [(NOT_READ, None, ID)]


class TestABodyIsWithoutFault:
    def test_as_the_schema_writes_it(self) -> None:
        assert fault(BODY) is None

    @pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, True, 1.0, "1", None, [1], {}])
    def test_only_under_a_version_that_is_known_here(self, version: object) -> None:
        body = json.dumps(with_value("telemetry_schema", version), separators=(",", ":"))
        assert fault(body) == "its body names a telemetry_schema that is unknown here"

    @pytest.mark.parametrize("body", ["", "{", "{}", "[]", "[1]", '"a"', "1", "null", "NaN"])
    def test_only_as_an_object_that_names_its_version(self, body: str) -> None:
        assert fault(body) == "its body is no JSON object that names a telemetry_schema"

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
        assert json.loads(body)["telemetry_schema"] == 1
        assert fault(body) == "its body is not written in the canonical form"

    @pytest.mark.parametrize("name", FIELDS[1:])
    @pytest.mark.parametrize("value", [12_345, "somebody@example.com"])
    def test_only_without_a_raw_number_or_free_text_which_are_not_repeated(
        self, name: str, value: object
    ) -> None:
        sentence = fault(json.dumps(with_value(name, value)))
        assert sentence
        assert sentence.startswith(f"its body is not of schema {SCHEMA_VERSION}: {name} (")
        assert str(value) not in sentence

    @pytest.mark.parametrize("section", ["", "counts.", "features.", "stack."])
    def test_only_without_an_unknown_field(self, section: str) -> None:
        sentence = fault(json.dumps(with_value(f"{section}domains", "0")))
        assert sentence
        assert sentence.startswith(f"its body is not of schema {SCHEMA_VERSION}: ")
        assert "extra_forbidden" in sentence

    @given(st.text() | st.recursive(st.none(), st.lists).map(json.dumps))
    def test_and_whatever_it_is_the_answer_is_a_sentence(self, body: str) -> None:
        assert fault(body)

    def test_that_does_not_repeat_a_name_that_could_forge_a_line(self) -> None:
        body = '{"telemetry_schema":1,"a\\nNo problem, says acme.example":1}'
        told = fault(body)
        assert told
        assert told.isprintable()

    def test_that_is_told_of_a_body_however_deep(self) -> None:
        assert fault("[" * 200_000) == "its body is no JSON object that names a telemetry_schema"


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
    assert problem.sentence == "it was written on another day than it is for"
