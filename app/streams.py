"""The standard streams, which may be closed when a process starts."""

import os
import sys

_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}
"""In the order of their descriptors: 0, 1, 2."""


def ensure() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    Otherwise the next socket becomes stdin, stdout or stderr, and receives whatever is printed.
    ``sys.__stdout__`` and the like stay None for a closed stream.
    """
    for descriptor, (name, mode) in enumerate(_MODES.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            # Not by descriptor: Dramatiq's master may use it for something else.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open until the process ends
