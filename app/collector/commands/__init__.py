"""The maintainers' commands: releases, recounts, and invented installs.

Each reads and writes the database of COLLECTOR_DATABASE_URL. They need no web process.
"""

import typer

from app.collector.commands import counting, releases, suspects
from app.collector.commands.counting import NotDoneError

__all__ = ["NotDoneError", "cli"]

cli = typer.Typer()
for each in (releases, counting, suspects):
    cli.add_typer(each.cli)
