"""What ``audit --verify`` asks, and how it prints what was found."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from typing import IO

import typer
from rich.console import Console

from app import report
from app.cli.entry import CommandError, complain, explained
from app.cli.printing import count, print_json
from app.pipeline import Pipeline
from app.report import Verification
from app.verification import Confirmed, Problem, There


def verify(
    pipeline: Pipeline, log: IO[bytes] | None, *, since: date | None, remote: bool, as_json: bool
) -> None:
    """Verify the rows of ``since`` and later, beside a log and the receiver; print what was found.

    Raises:
        CommandError: there is a problem, or something could not be read or asked.
    """
    with explained():
        there = _asked(pipeline, since) if remote else None
    try:
        with explained():
            found = report.verify(pipeline, log, since=since, there=there)
    except OSError as error:
        raise CommandError(f"The log cannot be read: {error.strerror}.") from error
    _print(found, as_json=as_json)


def _asked(pipeline: Pipeline, since: date | None) -> There:
    """Say what leaves, then ask the receiver."""
    pipeline.settings.require_endpoint()
    endpoint = pipeline.settings.endpoint_without_query
    ids = report.ids(pipeline)
    what = count(len(ids), "id")
    if since:
        what += f", from {since} on"
    asking = f"Asking {endpoint} what it holds under {what}: nothing else is sent."
    if not ids:
        asking = f"No id is on record, so that {endpoint} is not asked for anything."
    typer.echo(asking, err=True)
    with Console(stderr=True).status("Asking the receiver …") as status:
        return report.ask(pipeline, ids, since=since, tell=status.update)


def _print(found: Verification, *, as_json: bool) -> None:
    if found.too_long:
        lines = count(len(found.too_long), "line is", "lines are")
        complain(
            f"In the log {lines} skipped as too long to hold a body, the first of them line"
            f" {found.too_long[0]}."
        )
    where = f"{count(found.rows, 'heartbeat')} with {count(found.attempts, 'attempt')}"
    if found.logged is not None:
        where += f" and {count(found.logged, 'logged body', 'logged bodies')}"
    if as_json:
        print_json({"verified": not found.problems, **asdict(found)})
    else:
        for sentence in _sentences(found, where):
            typer.echo(sentence)
    if found.problems:
        problems = count(len(found.problems), "problem")
        raise CommandError(f"{problems} in {where}.", printed=as_json)


def _sentences(found: Verification, where: str) -> Iterator[str]:
    for problem in found.problems:
        yield f"{_place(problem)}: {problem.sentence}."
    if not found.problems:
        yield f"No problem in {where}."
        yield "Each body is as its schema allows, and the trigger that freezes it stands."
        yield "The attempts are numbered without a gap, and every sent row has a success."
        if found.logged is not None:
            yield "Each logged body is stored, and each that was sent was logged."
    if found.remote:
        yield _held(found.remote)


def _held(remote: Confirmed) -> str:
    held = remote.equal - remote.equal_unsent
    of = count(remote.sent, "heartbeat that was sent", "heartbeats that were sent")
    return f"The receiver at {remote.endpoint} holds {held} of the {of}, byte for byte."


def _place(problem: Problem) -> str:
    if problem.line is not None:
        return f"log, line {problem.line}"
    if problem.instance_id:
        return f"receiver, {problem.instance_id}"
    return f"{problem.day} {problem.id}" if problem.id else "telemetry_outbox"
