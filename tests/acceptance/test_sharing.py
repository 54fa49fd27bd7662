"""One Redis for several programs: two installs, Celery's URL, and TLS."""

import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from redis import Redis
from sqlalchemy import Engine, make_url

from tests.conftest import Databases
from tests.support.database import outbox_row
from tests.support.processes import WAYS, Processes, namespace
from tests.support.proxy import proxying
from tests.support.receiver import Receiver
from tests.support.steps import ready

OTHERS = 3
SOON = 10
"""Seconds; a wake-up that another install takes comes back after a minute at the earliest."""


@pytest.fixture
def elsewhere(
    databases: Databases, database_url: str, environment: dict[str, str]
) -> Iterator[dict[str, str]]:
    """Another install's variables: a database of its own, the same Redis, and telemetry off."""
    with databases.copy_of("template1") as url:
        name = make_url(url).database
        own = make_url(environment["DATABASE_URL"]).set(database=name)
        assert name != make_url(database_url).database
        yield {
            "DATABASE_URL": own.render_as_string(hide_password=False),
            "TELEMETRY_ENABLED": "false",
        }


@pytest.mark.usefixtures("due")
def test_workers_of_another_install_take_none_of_this_ones_wake_ups(
    processes: Processes, elsewhere: dict[str, str], receiver: Receiver, db: Engine
) -> None:
    others = [ready(processes, LOG_LEVEL="DEBUG", **elsewhere) for _ in range(OTHERS)]
    worker = ready(processes)
    processes.wake("heartbeat")
    receiver.wait_for(1, SOON)
    worker.wait_for("telemetry.attempt", seconds=SOON)
    assert outbox_row(db)["state"] == "sent"
    assert not any("Received message" in other.output() for other in others)
    with Redis.from_url(processes.environment["REDIS_URL"]) as client:
        keys = {key.decode() for key in client.scan_iter()}
    mine, theirs = (namespace(each) for each in (processes.environment, elsewhere))
    assert mine != theirs
    assert all(key.startswith((mine, theirs)) for key in keys), keys


@pytest.fixture
def redis_over_tls(redis_url: str, authority: trustme.CA) -> Iterator[str]:
    """The address of the Redis over TLS, with a certificate that nobody vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with proxying("tunnel", urlsplit(redis_url).port or 0, context) as tunnel:
        yield f"rediss://127.0.0.1:{tunnel.port}/0"


@pytest.mark.usefixtures("due")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("word", ["CERT_NONE", "none"])
def test_a_redis_that_celery_reaches_over_tls_is_reached_by_the_same_url(
    processes: Processes, redis_over_tls: str, receiver: Receiver, db: Engine, way: str, word: str
) -> None:
    processes.environment["REDIS_URL"] = f"{redis_over_tls}?ssl_cert_reqs={word}"
    worker, *_ = processes.start_all(way)
    receiver.wait_for(1)
    worker.wait_for("telemetry.attempt")
    assert outbox_row(db)["state"] == "sent"


@pytest.mark.usefixtures("due")
def test_a_redis_whose_authority_is_named_is_reached_and_checked(
    processes: Processes,
    redis_over_tls: str,
    authority: trustme.CA,
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    checked = f"{redis_over_tls}?ssl_cert_reqs=CERT_REQUIRED"
    processes.start("solo", REDIS_URL=f"{checked}&ssl_ca_certs={bundle}")
    receiver.wait_for(1)
    unknown = processes.start("solo", REDIS_URL=checked)
    unknown.wait_for(
        'telemetry.failed stage=redis error="the certificate of Redis cannot be verified"'
    )
