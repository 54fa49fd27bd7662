"""The command ``check``: what a maintainer must look at, for cron and monitoring."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from threading import Thread
from typing import Annotated

import typer
from sqlalchemy import Connection, text

from app.collector import bounded, daily, events, health, outcomes, recount
from app.collector.daily import ACTIVE_2D
from app.collector.names import DEVELOPMENT
from app.settings.collector import CollectorSettings

AT_MOST_SECONDS = 9.0
"""After so long the command reports that the database does not answer."""
PATIENCE_SECONDS = 4.0
"""How long the server has for each answer: reading a million installs takes 2 seconds."""

SILENT_AFTER = timedelta(hours=26)
"""Each install reports once a day, within a quarter of an hour; this leaves time for a retry."""
REFUSALS = ("invalid", "too large", "rate-limited", "too many ids")
REFUSED_PERCENT = 5
FEWEST_REQUESTS = 20
INSTALLS_OF_A_VERSION = 5
ONE_CLIENT_PERCENT = 50
"""The busier of two proxies may send as much; the installs of a fleet have different addresses."""
FEWEST_OF_CLIENTS = 50
VERSIONS_NAMED = 10


@dataclass(frozen=True)
class Finding:
    """Something to look at: a word that never changes, and a sentence for a person."""

    what: str
    sentence: str


@dataclass(frozen=True)
class Report:
    """What was found, and the progress of a recount, if one is running."""

    findings: list[Finding]
    note: str | None = None


def command(
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help='Print {"ok": …, "findings": [{"what", "sentence"}]}.')
    ] = False,
) -> None:
    """Report what a maintainer must look at.

    It exits with 1 if there is a finding, with 0 if not, and with 2 if a variable is missing or
    wrong. It reads the database of COLLECTOR_DATABASE_URL, changes nothing and takes at most 10
    seconds. Each finding is one sentence on stdout:

    \b
    - not ready: the database cannot be used (what /readyz says)
    - not counted: the last finished day is not counted, an hour after its end
    - silent: no heartbeat was accepted for 26 hours
    - fell: active installs fell by more than 30 % in 7 days (from 20 on)
    - refused: more than 5 % of the requests of today and yesterday were refused
    - one client: half of those requests or more came from one address (from 50 requests on)
    - newer schema: installs send a schema that this collector does not support
    - unlisted version: 5 or more installs run a version that is not listed

    From cron, which mails what is printed:

    \b
    0 * * * *  out=$(python -m app.collector check) || echo "$out"
    """  # noqa: D301 - Click does not wrap the lines below a \b
    settings = CollectorSettings.load()
    settings.refuse_what_is_wrong()
    found = check(settings.require("collector_database_url"))
    typer.echo(_document(found) if as_json else _words(found))
    sys.exit(1 if found.findings else 0)


def _document(report: Report) -> str:
    ok = not report.findings
    return json.dumps({"ok": ok, "findings": [asdict(each) for each in report.findings]})


def _words(report: Report) -> str:
    if report.findings:
        return "\n".join(each.sentence for each in report.findings)
    return f"All is well. {report.note}" if report.note else "All is well."


def check(url: str, *, within: float = AT_MOST_SECONDS) -> Report:
    """Look at the collector's database of ``url`` for at most ``within`` seconds."""
    found: list[Report] = []
    # The name server may be silent too: the process ends without waiting for this thread.
    thread = Thread(target=lambda: found.append(_look(url)), daemon=True)
    thread.start()
    thread.join(within)
    return found[0] if found else _not_ready(health.SILENT)


def _not_ready(reason: str) -> Report:
    return Report([Finding("not ready", _sentence(reason))])


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _look(url: str) -> Report:
    engine = bounded.connect(url, patience=PATIENCE_SECONDS)
    try:
        with engine.connect() as connection:
            return _report(connection)
    except Exception as error:  # noqa: BLE001 - no traceback: it may contain what a stranger sent
        return _not_ready(health.cause(error))


_BOUND = text(
    f"SELECT set_config('statement_timeout', '{PATIENCE_SECONDS:g}s', true), clock_timestamp()"
)


def _report(connection: Connection) -> Report:
    look = health.look_by(connection)
    if look.trouble:
        return _not_ready(look.trouble)
    with connection.begin():
        now: datetime = connection.execute(_BOUND).one()[1]
        again = recount.progress(connection)
        findings = [*_not_counted(look), *_found(connection, now)]
    return Report(findings, _sentence(health.under_way(again)) if again else None)


def _not_counted(look: health.Look) -> Iterator[Finding]:
    if look.not_counted:
        yield Finding("not counted", _sentence(look.not_counted))


def _found(connection: Connection, now: datetime) -> Iterator[Finding]:
    looks: tuple[Callable[[Connection, datetime], Iterator[Finding]], ...] = (
        _silent,
        _fell,
        _ingest,
        _one_client,
        _unlisted,
    )
    for each in looks:
        yield from each(connection, now)


# A time later than now was stored by a wrong clock: it would hide that nothing arrives.
_HEARD = text(
    "SELECT last_seen FROM install WHERE last_seen <= :now ORDER BY last_seen DESC LIMIT 1"
)
_ACCEPTED = text(
    "SELECT max(day) FROM ingest WHERE outcome = 'accepted'"
    " AND day <= CAST(CAST(:now AS timestamptz) AT TIME ZONE 'UTC' AS date)"
)


def _silent(connection: Connection, now: datetime) -> Iterator[Finding]:
    heard: datetime | None = connection.scalar(_HEARD, {"now": now})
    if heard is None:  # there is no install, or all were deleted
        day: date | None = connection.scalar(_ACCEPTED, {"now": now})
        heard = daily.begins(day + daily.DAY) if day else None
    if heard and now - heard > SILENT_AFTER:
        hours = int((now - heard).total_seconds() // 3600)
        yield Finding("silent", f"No heartbeat was accepted for {hours} hours.")


def _fell(connection: Connection, _: datetime) -> Iterator[Finding]:
    span = daily.span(connection)
    if span is None:
        return
    before = span.last - events.WEEK
    active = daily.stocks(connection, before, span.last, daily.Filter())
    then, now = (active.get(day, {}).get(ACTIVE_2D, 0) for day in (before, span.last))
    if events.fell(then, now):
        yield Finding(
            "fell",
            f"Active installs fell from {then} to {now}"
            f" ({(then - now) / then:.0%}) in the 7 days to {span.last}.",
        )


def _ingest(connection: Connection, now: datetime) -> Iterator[Finding]:
    days = [outcomes.of_day(connection, day) for day in _since_yesterday(now)]
    ended = {outcome: sum(day.get(outcome, 0) for day in days) for outcome in {*days[0], *days[1]}}
    newer = ended.pop("newer schema", 0)
    refused = {outcome: ended[outcome] for outcome in REFUSALS if ended.get(outcome)}
    requests = sum(ended.values())
    if requests >= FEWEST_REQUESTS and 100 * sum(refused.values()) > REFUSED_PERCENT * requests:
        why = ", ".join(f"{count} {outcome}" for outcome, count in refused.items())
        yield Finding(
            "refused",
            f"{sum(refused.values())} of {requests} requests since yesterday were refused: {why}.",
        )
    if newer:
        yield Finding(
            "newer schema",
            f"{newer} requests since yesterday had a newer schema than this collector supports:"
            " upgrade it today to lose none of them.",
        )


def _one_client(connection: Connection, now: datetime) -> Iterator[Finding]:
    days = _since_yesterday(now)
    requests = sum(sum(outcomes.of_day(connection, day).values()) for day in days)
    # A request is counted for its client before it is counted as an outcome.
    by_one = min(sum(outcomes.from_the_busiest(connection, day) for day in days), requests)
    if requests >= FEWEST_OF_CLIENTS and 100 * by_one >= ONE_CLIENT_PERCENT * requests:
        yield Finding(
            "one client",
            f"{by_one} of {requests} requests since yesterday came from one address. If that is"
            " your proxy, name it in FORWARDED_ALLOW_IPS: all installs share its limits.",
        )


def _since_yesterday(now: datetime) -> tuple[date, date]:
    today = now.astimezone(UTC).date()
    return today - daily.DAY, today


_UNLISTED = text(
    f"""
    SELECT body ->> 'version' AS version, count(*) AS installs
    FROM install
    WHERE last_seen >= CAST(:now AS timestamptz) - interval '48 hours'
        AND excluded IS NULL AND established_on IS NOT NULL
        AND right(body ->> 'version', 4) <> '{DEVELOPMENT}'
        AND NOT EXISTS (SELECT FROM release WHERE version = body ->> 'version')
    GROUP BY 1 HAVING count(*) >= :least
    ORDER BY installs DESC, version LIMIT :named
    """  # noqa: S608 - only constants of this module
)


def _unlisted(connection: Connection, now: datetime) -> Iterator[Finding]:
    values = {"now": now, "least": INSTALLS_OF_A_VERSION, "named": VERSIONS_NAMED}
    for version, installs in connection.execute(_UNLISTED, values):
        yield Finding(
            "unlisted version",
            f"{installs} installs run {version}, which is not listed: if it is yours, run"
            f" `python -m app.collector releases add {version} --on DAY`.",
        )
