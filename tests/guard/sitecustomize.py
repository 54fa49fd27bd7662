"""Lets every Python process of the tests connect to loopback and unix sockets only.

Python imports this module when it starts, if the module's directory is on PYTHONPATH.
tests/support/processes.py sets PYTHONPATH for the processes that tests start; conftest.py imports
this module for the tests themselves.

These environment variables control a process:

- GUARD_TRACE=FILE appends each address that the process connects to.
- GUARD_POINT=MODULE:FUNCTION:call (or :return) makes the process act when it calls the function
  (or returns from it). tests/support/processes.py rejects a point that does not exist.
- GUARD_ACTION=wait writes the process id to the file GUARD_REACHED, the first time only, and waits
  until the process is killed or the file is deleted.
- GUARD_ACTION=die kills the process, every time.
- GUARD_CLOCK=SECONDS sets the clock of the process ahead by this many seconds.
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
    """A test tried to connect to another machine."""


def _is_local(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in LOCAL_NAMES:
        return True
    try:
        return ip_address(name).is_loopback or ip_address(name).is_unspecified
    except ValueError:
        return False


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Reject a connection, a datagram or a name look-up that would leave this machine."""
    if event in {"socket.connect", "socket.sendto"}:
        address = arguments[1]
        if trace := os.environ.get("GUARD_TRACE"):
            with open(trace, "a") as file:  # noqa: PTH123 - pathlib is not loaded this early
                file.write(f"{address}\n")
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise CutOffError(f"tests may not use the network: {event} to {address[0]}")
    elif event == "socket.getaddrinfo" and not _is_local(arguments[0]):
        _answer_as_a_resolver(os.fsdecode(arguments[0]))


def _answer_as_a_resolver(name: str) -> None:
    """Answer for a reserved name as a resolver does, without a packet; reject any other name."""
    if name == SLOW_NAME:
        time.sleep(SLOW_SECONDS)
    if name.endswith(UNKNOWN_NAME):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    raise CutOffError(f"tests may not use the network: look-up of {name}")


sys.addaudithook(guard)


def stop_at(point: str, action: str) -> None:
    """Make every thread of this process, and of its forks, act at a named point of the code."""
    module, function, when = point.split(":")
    first = iter([True])

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        if event != when or frame.f_code.co_name != function:
            return
        # The name in the spec is the module's own, even if the module runs as __main__.
        if getattr(frame.f_globals.get("__spec__"), "name", None) != module:
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
