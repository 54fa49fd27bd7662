"""Cuts every Python process of the tests off from all but loopback and unix sockets.

Python imports this module at start-up where its directory is on PYTHONPATH; conftest.py puts it
there for the processes that the tests start, and imports it for the tests themselves.

GUARD_TRACE=FILE appends every address that is connected to. GUARD_POINT=MODULE:FUNCTION:call (or
:return) has the process act there: GUARD_ACTION=wait writes its process id into the file
GUARD_REACHED, the first time only, and waits until it is killed or the file is gone;
GUARD_ACTION=die kills it, every time. GUARD_CLOCK=SECONDS has its clock be so much ahead.
"""

import os
import signal
import socket
import sys
import threading
import time
from ipaddress import ip_address
from types import FrameType
from typing import Any

LOCAL_NAMES = {"localhost", "", None}
UNKNOWN_NAME = ".invalid"
SLOW_NAME = "slow.invalid"
SLOW_SECONDS = 8.0


class CutOffError(OSError):
    """A test tried to reach beyond this machine."""


def _is_local(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in LOCAL_NAMES:
        return True
    try:
        return ip_address(name).is_loopback or ip_address(name).is_unspecified
    except ValueError:
        return False


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a connection, a datagram or a name look-up that would leave this machine."""
    if event in {"socket.connect", "socket.sendto"}:
        address = arguments[1]
        if trace := os.environ.get("GUARD_TRACE"):
            with open(trace, "a") as file:  # noqa: PTH123 - pathlib is not loaded this early
                file.write(f"{address}\n")
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise CutOffError(f"{event} to {address[0]} is cut in tests")
    elif event == "socket.getaddrinfo" and not _is_local(arguments[0]):
        _answer_as_a_resolver(os.fsdecode(arguments[0]))


def _answer_as_a_resolver(name: str) -> None:
    """Say, without a packet, what a resolver says of a reserved name; refuse to ask of others."""
    if name == SLOW_NAME:
        time.sleep(SLOW_SECONDS)
    if name.endswith(UNKNOWN_NAME):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    raise CutOffError(f"the look-up of {name} is cut in tests")


sys.addaudithook(guard)


def stop_at(point: str, action: str) -> None:
    """Have every thread of this process, and of its forks, act at a named point of the code."""
    module, function, when = point.split(":")
    first = iter([True])

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        at = frame.f_code.co_name == function and frame.f_globals.get("__name__") == module
        if not at or event != when:
            return
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if not next(first, False):
            return
        reached = os.environ["GUARD_REACHED"]
        with open(reached, "w") as file:  # noqa: PTH123 - as above
            file.write(str(os.getpid()))
        while os.path.exists(reached):  # noqa: PTH110 - as above
            time.sleep(0.02)

    threading.setprofile(watch)
    sys.setprofile(watch)


if ahead := os.environ.get("GUARD_CLOCK"):
    import time_machine

    time_machine.travel(time.time() + float(ahead), tick=True).start()

if "GUARD_POINT" in os.environ:
    stop_at(os.environ["GUARD_POINT"], os.environ["GUARD_ACTION"])
