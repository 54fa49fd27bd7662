"""``send``: the day's heartbeat, sent now or handed out to be carried by hand."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from app import log
from app.cli.entry import FAILED, SWITCHED_OFF, CommandError, command, explained
from app.cli.printing import AsJson, print_json, time
from app.outbox import Record
from app.pipeline import Carried, Pipeline, Sent
from app.settings import Disabled, Settings
from app.verification import was_sent


@command(short_help="Send the day's heartbeat now.")
def send(
    *,
    by_hand: Annotated[
        bool,
        typer.Option(
            "--by-hand",
            help="Send nothing; print the body, for you to carry to the receiver. That day's"
            " heartbeat is then never sent from here. Run again on the same day, this prints the"
            " same bytes.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the current day's heartbeat if it is missing, and send it now.

    The current day began at the latest 02:30 UTC. Does not wait for the notice, for the install's
    offset or for a backoff, but never sends before the time that a receiver asked for. Exits with 0
    if the day's heartbeat has been sent, now or before; with 1 if it could not be sent; with 3
    when telemetry is off.
    """
    settings = Settings.load()
    if isinstance(settings.gate, Disabled):
        raise CommandError(f"Telemetry is off: {settings.gate.reason}.", SWITCHED_OFF)
    log.setup(settings.log_level, sys.stderr if as_json or by_hand else sys.stdout)
    if by_hand:
        _carry(settings, as_json=as_json)
        return
    with explained(), Console(stderr=True).status("Sending the day's heartbeat …"):
        result = Pipeline(settings).send()
    sent, sentence = _outcome(result)
    if as_json:
        print_json({"sent": sent, "said": sentence, "day": result.day, "row": result.row})
    else:
        typer.echo(sentence)
    if not sent:
        raise typer.Exit(FAILED)


def _carry(settings: Settings, *, as_json: bool) -> None:
    with explained():
        result = Pipeline(settings).carry()
    day = f"The heartbeat of {result.day}"
    if result.body is None:
        said = f"{day} cannot be carried by hand: {_why_not_carried(result)}."
    else:
        to = settings.endpoint_without_query
        said = f"{day} is yours to carry: POST these bytes to {to}. It is not sent from here."
    if as_json:
        print_json({"sent": False, "said": said, "day": result.day, "row": result.row})
    if result.body is None:
        raise CommandError(said, printed=as_json)
    if not as_json:
        # A file gets the exact bytes, without a newline at the end.
        typer.echo(result.body, nl=sys.stdout.isatty())
        typer.echo(said, err=True)


def _why_not_carried(result: Carried) -> str:
    elsewhere = "another program has sent it: see instance.last_telemetry_at"
    row = result.row
    if row is None:
        return elsewhere if result.obstacle == "sent elsewhere" else "it was not written"
    match row["state"]:
        case "sending":
            return "a worker is sending it right now; try again"
        case _ if was_sent(row):
            return "it has been sent"
        case "pending":
            return elsewhere
        case "discarded" if row["last_error"] == "sent elsewhere":
            return elsewhere
    return _final(row)


def _final(row: Record) -> str:
    error = row["last_error"] or "no attempt was made"
    return f"it is {row['state']} ({error}), so that day gets no other heartbeat"


def _outcome(result: Sent) -> tuple[bool, str]:
    """Return whether the day's heartbeat has been sent, and a sentence about it."""
    row, day = result.row, f"The heartbeat of {result.day}"
    if result.obstacle == "sent elsewhere":
        return True, f"{day} was sent by another program: see instance.last_telemetry_at."
    if row is None:
        return False, f"{day} was not written."
    if row["state"] == "discarded" and row["last_error"] == "sent elsewhere":
        return True, f"{day} was sent by another program: see instance.last_telemetry_at."
    if row["state"] == "sent":
        when = "before" if result.sent_before else "now"
        return True, f"{day} has been sent ({when}, {time(row['finished_at'])})."
    return False, f"{day} was not sent: {_why_not(row)}."


def _why_not(row: Record) -> str:
    error, not_before = row["last_error"] or "no attempt was made", row["not_before"]
    match row["state"]:
        case "sending":
            return "a worker is sending it right now; check `status` later"
        case "pending" if not_before and not_before >= row["next_attempt_at"]:
            return f"{error}; the receiver asks for no attempt before {time(not_before)}"
        case "pending":
            return f"{error}; next attempt {time(row['next_attempt_at'])}"
    return _final(row)
