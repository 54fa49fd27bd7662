"""``audit --verify``: asks the receiver, verifies, and prints the result."""

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
    """Verify the rows of ``since`` and later, compare them with a log and the receiver, and print.

    Raises:
        CommandError: a problem was found, the log cannot be read, or the receiver cannot be asked.
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
    """Print what is sent to the receiver, then ask it."""
    pipeline.settings.require_endpoint()
    endpoint = pipeline.settings.endpoint_without_query
    ids = report.ids(pipeline)
    what = count(len(ids), "id")
    if since:
        what += f", from {since} on"
    asking = f"Asking {endpoint} what it holds under {what}. Nothing else is sent."
    if not ids:
        asking = f"No id is stored, so {endpoint} is not asked."
    typer.echo(asking, err=True)
    with Console(stderr=True).status("Asking the receiver …") as status:
        return report.ask(pipeline, ids, since=since, show=status.update)


def _print(found: Verification, *, as_json: bool) -> None:
    if found.too_long:
        lines = count(len(found.too_long), "line is", "lines are")
        complain(
            f"In the log, {lines} skipped as too long to hold a body; the first is line"
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
        yield "Each body matches its schema, and the trigger that protects the rows is in place."
        yield "The attempts have no gap in their numbers; every sent row has a successful attempt."
        if found.logged is not None:
            yield "Each logged body is stored, and each body sent is in the log."
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
