"""A named pipe whose reader reads only what a test asks for."""

import os
from contextlib import suppress
from pathlib import Path


class Pipe:
    """A pipe that a test fills and drains. A process that opens ``path`` writes into it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.open()
        self._filler = os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    def open(self) -> None:
        """Open the reading end again."""
        self._reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def fill(self) -> None:
        """Fill the pipe."""
        page = b"." * 4095 + b"\n"
        with suppress(BlockingIOError):
            while True:
                os.write(self._filler, page)

    def read(self) -> bytes:
        """Read and return everything in the pipe."""
        parts = []
        with suppress(BlockingIOError):
            while part := os.read(self._reader, 1 << 16):
                parts.append(part)
        return b"".join(parts)

    def hang_up(self) -> None:
        """Close the reading end."""
        os.close(self._reader)

    def close(self) -> None:
        os.close(self._filler)
        with suppress(OSError):
            os.close(self._reader)
