"""The standard streams, which whoever starts a process may have closed."""

import os
import sys

_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}
"""By descriptor: 0, 1 and 2."""


def ensure() -> None:
    """Open /dev/null in the place of each standard stream that is closed.

    Otherwise the next socket that is opened becomes stdin, stdout or stderr, and receives what
    somebody prints. ``sys.__stdout__`` and its like still are None where a stream was closed.
    """
    for descriptor, (name, mode) in enumerate(_MODES.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            # Not the descriptor itself: Dramatiq's master may have opened something else there.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open
