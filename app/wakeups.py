"""The Redis for wake-ups: connecting to it, naming its errors, and the time of the last sweep.

The workers run Dramatiq on it; the operator's commands only read.
"""

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from app.settings import Settings, SettingsError

TIMEOUT = 2
"""Seconds to wait for Redis: short, so that a process stops promptly while Redis hangs."""

CLIENT_NAME = "consentos-telemetry"

_REMEMBERED = timedelta(days=30)
"""How long the time of the last sweep is stored."""


def pool(settings: Settings) -> redis.ConnectionPool:
    """Return a pool of connections to REDIS_URL; none is open yet.

    Raises:
        SettingsError: the URL is missing, or has an unknown option or a wrong value.
    """
    try:
        made = redis.ConnectionPool.from_url(
            settings.require("redis_url"),
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            socket_keepalive=True,
            health_check_interval=30,
            # Reconnects if an idle connection broke; does not retry after a timeout.
            retry=Retry(ConstantBackoff(0.1), 2, supported_errors=(redis.ConnectionError,)),
            client_name=CLIENT_NAME,
        )
        made.connection_class(**made.connection_kwargs)  # checks the options without connecting
    except (TypeError, ValueError, redis.RedisError):
        raise SettingsError(
            "REDIS_URL has an unknown option, or an option with a wrong value."
        ) from None
    return made


@dataclass(frozen=True)
class Seen:
    """The state of Redis: why it cannot be used, and how long ago a worker last swept."""

    trouble: str | None
    swept_ago: timedelta | None = None


def look(settings: Settings) -> Seen:
    """Ask Redis once, with the settings of the workers."""
    try:
        with redis.Redis(connection_pool=pool(settings)) as client:
            left = client.pttl(_swept(settings.namespace))
    except SettingsError as error:
        return Seen(str(error).removesuffix("."))
    except redis.RedisError as error:
        return Seen(cause(error))
    return Seen(None, _REMEMBERED - timedelta(milliseconds=left) if left > 0 else None)


def record_sweep(client: redis.Redis, namespace: str) -> None:
    """Store that a worker sweeps now, as the remaining life of a key: Redis's clock counts it.

    Raises:
        redis.RedisError: Redis cannot be used.
    """
    client.set(_swept(namespace), "", px=_REMEMBERED)


def _swept(namespace: str) -> str:
    return f"{namespace}:swept"


_ANSWERS = {
    "NOAUTH": "Redis asks for a password",
    "WRONGPASS": "Redis refuses the user or the password",
    "NOPERM": "Redis does not allow its user a command or a key (ACL SETUSER in docs/operate.md)",
    "LOADING": "Redis is still loading its data",
    "READONLY": "this Redis is a replica, which cannot be written to",
    "OOM": "Redis has no memory left",
}
_DENIED_IN_A_SCRIPT = "ACL failure in script"
"""The beginning of a message that has no error code; it is always in English."""

_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (redis.AuthenticationError, _ANSWERS["WRONGPASS"]),
    (redis.MaxConnectionsError, "Redis has no connection left"),
    (ssl.SSLCertVerificationError, "the certificate of Redis cannot be verified"),
    (ssl.SSLError, "the TLS handshake with Redis failed, or Redis does not use TLS"),
    (socket.gaierror, "the host in REDIS_URL is unknown"),
    (ConnectionRefusedError, "nothing listens at the address in REDIS_URL"),
    (TimeoutError, "Redis does not answer"),
    (redis.TimeoutError, "Redis does not answer"),
)


def cause(error: BaseException) -> str:
    """Return why Redis cannot be used, in words that contain no value of the error."""
    chain = [*_chain(error)]
    for each in chain:
        if answer := _ANSWERS.get(getattr(each, "status_code", None) or ""):
            return answer
        if str(each).startswith(_DENIED_IN_A_SCRIPT):
            return _ANSWERS["NOPERM"]
    for kind, words in _CAUSES:
        if any(isinstance(each, kind) for each in chain):
            return words
    connected = isinstance(error, redis.ResponseError)
    return "Redis answers with an error" if connected else "Redis cannot be reached"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
