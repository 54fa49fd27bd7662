"""The sender's times: how long it waits for an answer, for another try, and for its own thread."""

import os
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from inspect import signature
from pathlib import Path
from threading import Event, Thread

import httpx
import pytest

from app import sender
from app.retry import Outcome
from tests.support.receiver import Receiver, answer

NOW = datetime(2026, 5, 2, 2, 30, tzinfo=UTC)
BODY = b'{"telemetry_schema":1}'


class Hurried(Event):
    """A request to stop that never comes; it records the waits for it and ends each at once."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return self.is_set()


def drain(receiver: Receiver) -> tuple[Outcome, list[float]]:
    """Make the tries of a drain; return the last outcome and the seconds of each wait."""
    hurried = Hurried()
    target = sender.Target(receiver.url, schema=1, timeout=5)
    for each in sender.tries(hurried):
        outcome = sender.post(target, BODY, at=NOW, stopping=hurried)
        each.another_follows(outcome)
    return outcome, hurried.waits


def post(url: str, timeout: float, at: datetime = NOW) -> Outcome:
    target = sender.Target(url, schema=1, timeout=timeout)
    return sender.post(target, BODY, at=at, stopping=Event())


class TestBetweenTwoTries:
    def test_the_wait_is_half_a_second_then_a_second_and_up_to_half_a_second_more(
        self, receiver: Receiver
    ) -> None:
        receiver.answers = [answer(503)]
        _, (first, second) = drain(receiver)
        assert 0.5 <= first < 1
        assert 1 <= second < 1.5

    def test_the_wait_differs_from_one_install_to_the_next(self, receiver: Receiver) -> None:
        receiver.answers = [answer(503)]
        assert len({wait for _ in range(5) for wait in drain(receiver)[1]}) == 10

    def test_a_retry_after_of_three_seconds_is_waited_out(self, receiver: Receiver) -> None:
        receiver.answers = [answer(503, "Retry-After: 3"), answer(202)]
        outcome, waits = drain(receiver)
        assert waits == [3]
        assert outcome.result == "sent"

    def test_a_longer_retry_after_ends_the_drain(self, receiver: Receiver) -> None:
        receiver.answers = [answer(503, "Retry-After: 4"), answer(202)]
        outcome, waits = drain(receiver)
        assert waits == []
        assert (outcome.status, outcome.retry_after) == (503, timedelta(seconds=4))


def test_a_retry_after_that_is_a_date_is_read_from_the_moment_of_the_answer(
    receiver: Receiver,
) -> None:
    receiver.during = lambda: time.sleep(0.2)
    asked = format_datetime(NOW + timedelta(hours=1), usegmt=True)
    receiver.answers = [answer(503, f"Retry-After: {asked}")]
    wait = post(receiver.url, timeout=5).retry_after
    assert wait
    assert timedelta(minutes=59) < wait <= timedelta(hours=1, seconds=-0.2)


def test_only_the_deadline_of_the_settings_ends_a_post(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpx's own time-outs are 5 seconds, which is less than the default deadline; here 0.05."""
    default: httpx.Timeout = signature(httpx.AsyncClient).parameters["timeout"].default
    for phase in ("connect", "read", "write", "pool"):
        assert getattr(default, phase) == 5
        monkeypatch.setattr(default, phase, 0.05)
    receiver.during = lambda: time.sleep(0.3)
    assert post(receiver.url, timeout=10).result == "sent"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:1"),
        ("ALL_PROXY", "foo://proxy"),
        ("NO_PROXY", "http://["),
    ],
)
def test_the_sender_reads_no_proxy_variable_of_the_environment(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert post(receiver.url, timeout=5).result == "sent"


def test_a_post_is_left_soon_after_its_deadline_though_its_thread_hangs(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread hangs as it does on a file system that does not answer: it reads certificates."""
    monkeypatch.setattr(sender, "GRACE", 0.1)
    certificates = tmp_path / "certificates"
    os.mkfifo(certificates)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates))
    sender.tls_context.cache_clear()
    outcomes: list[Outcome] = []
    posting = Thread(
        target=lambda: outcomes.append(post("https://127.0.0.1:1/", timeout=0.1)), daemon=True
    )
    posting.start()
    posting.join(2)
    os.close(os.open(certificates, os.O_RDWR))  # ends the thread's read
    assert [(each.result, each.error) for each in outcomes] == [("retryable", "deadline")]
    assert post(receiver.url, timeout=5).result == "sent"
