"""Parses a receiver's answer about what it holds under an id; the bytes are untrusted. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.payload import InstanceId, SentAt

PAGE = 1_000
"""The most heartbeats in one answer."""

LONGEST_BODY = 64 * 1024
"""The most characters of a body; a heartbeat has about 600."""

Days = Annotated[int, Field(ge=0, le=1_000_000)]


@dataclass(frozen=True)
class Holding:
    """The bodies that a receiver holds under one id, by their ``sent_at``.

    ``retention_days`` is how long the receiver stores a heartbeat; 0 means forever.
    """

    retention_days: int
    bodies: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """One answer: a part of a holding, and whether more follows."""

    holding: Holding
    more: bool


class NotAHoldingError(ValueError):
    """An answer is not a valid holding of the requested id."""


class _Answer(BaseModel):
    # A later collector may add fields.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Heartbeat(_Answer):
    sent_at: SentAt
    body: Annotated[str, Field(max_length=LONGEST_BODY)]


class _Held(_Answer):
    instance_id: InstanceId
    retention_days: Days
    heartbeats: Annotated[list[_Heartbeat], Field(max_length=PAGE)]
    more: bool


class _Nothing(_Answer):
    error: str
    retention_days: Days


def page(answer: bytes, instance_id: UUID, after: str | None) -> Page:
    """Parse what is held under ``instance_id`` with a ``sent_at`` later than ``after``.

    Raises:
        NotAHoldingError: it is not a holding, is out of order, or announces more but holds nothing.
    """
    try:
        held = _Held.model_validate_json(answer)
    except ValidationError as error:
        raise NotAHoldingError from error
    times = [each.sent_at for each in held.heartbeats]
    in_order = all(one < other for one, other in zip([after or "", *times], times, strict=False))
    if held.instance_id != str(instance_id) or not in_order or (held.more and not times):
        raise NotAHoldingError
    bodies = {each.sent_at: each.body for each in held.heartbeats}
    return Page(Holding(held.retention_days, bodies), held.more)


def nothing(answer: bytes) -> Holding:
    """Parse the answer that nothing is held under an id.

    Raises:
        NotAHoldingError: it is another answer, such as that of a server that has no such path.
    """
    try:
        return Holding(_Nothing.model_validate_json(answer).retention_days, {})
    except ValidationError as error:
        raise NotAHoldingError from error
