"""Asks the receiver what it stores under the ids that are on record here. Only the ids are sent."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from app import payload, sender
from app.holding import Holding, NotAHoldingError, Page, nothing, page
from app.sender import Answer, Target
from app.settings import Settings

LONGEST_WAIT = timedelta(seconds=60)
"""The longest Retry-After that is respected; a longer one ends the question."""

MOST_WAITS = 5
MOST_PAGES = 20
"""The most answers to read for one id. A year has 365 heartbeats, and a page up to 1,000."""


class ReceiverError(Exception):
    """The receiver did not answer what it stores; the message is a sentence."""


@dataclass
class _Patience:
    """How often the receiver may still ask to wait, and what reports each wait."""

    report: Callable[[str], object]
    waits: int = MOST_WAITS


def ask(
    settings: Settings, ids: Collection[UUID], after: str | None, on_wait: Callable[[str], object]
) -> dict[UUID, Holding]:
    """Ask the receiver that TELEMETRY_ENDPOINT names what it stores under each id.

    It is asked even if telemetry is off, because the operator asks, not the pipeline. ``after``, a
    ``sent_at``, limits the question to later heartbeats. ``on_wait`` gets a sentence about each
    wait that the receiver asks for.

    Raises:
        SettingsError: the settings name no usable endpoint; no receiver is asked.
        ReceiverError: there was no answer, or not the one that a collector gives.
    """
    target = Target(
        endpoint=settings.require_endpoint(),
        schema=payload.SCHEMA_VERSION,
        timeout=settings.telemetry_timeout_seconds,
        proxy=settings.proxy,
    )
    patience = _Patience(on_wait)
    name = f"The receiver at {settings.endpoint_without_query}"
    try:
        return {each: _held(target, each, after, patience) for each in ids}
    except NotAHoldingError as error:
        raise ReceiverError(
            f"{name} does not say what it holds: it is no collector of this project, or an older"
            " one."
        ) from error
    except _NoAnswerError as error:
        raise ReceiverError(f"{name} cannot be asked what it holds ({error}).") from error


class _NoAnswerError(Exception):
    """There was no readable answer; the message says why in a few words."""


def _held(target: Target, instance_id: UUID, after: str | None, patience: _Patience) -> Holding:
    """Ask, page by page, for everything that is stored under one id."""
    bodies: dict[str, str] = {}
    for _ in range(MOST_PAGES):
        found = _page(target, instance_id, after, patience)
        bodies |= found.holding.bodies
        if not found.more:
            return Holding(found.holding.retention_days, bodies)
        after = max(bodies)
    raise _NoAnswerError("it holds more heartbeats under one id than any install sends")


def _page(target: Target, instance_id: UUID, after: str | None, patience: _Patience) -> Page:
    answer = _answer(target, instance_id, after, patience)
    match answer.outcome.status:
        case 200:
            return page(answer.body, instance_id, after)
        case 404:
            return Page(nothing(answer.body), more=False)
    raise NotAHoldingError


def _answer(target: Target, instance_id: UUID, after: str | None, patience: _Patience) -> Answer:
    """Ask, and ask again after each wait that the receiver asks for.

    Raises:
        _NoAnswerError: the receiver could not be reached, or cannot answer now.
    """
    while True:
        answer = sender.held(target, instance_id, after)
        outcome = answer.outcome
        if outcome.result != "retryable":
            return answer
        wait = outcome.retry_after
        if not wait or wait > LONGEST_WAIT or not patience.waits:
            raise _NoAnswerError(outcome.error or f"HTTP {outcome.status}")
        patience.waits -= 1
        patience.report(f"The receiver asks to wait {wait.total_seconds():.0f} seconds …")
        time.sleep(wait.total_seconds())
