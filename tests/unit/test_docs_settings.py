"""The pages name each setting, command, answer, event and exit code of the code, and no other."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main

import app.cli  # noqa: F401 - registers every command
from app.cli.entry import EXIT_CODES
from app.cli.entry import app as telemetry
from app.collector.__main__ import cli as collector
from app.retry import result_of
from app.settings import Environment, Settings
from app.settings.collector import CollectorSettings
from tests.support.processes import ROOT

PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def table(page: str, *columns: str) -> list[list[str]]:
    """Return the cells of the page's table whose head begins with these columns."""
    head = re.escape(f"| {' | '.join(columns)} |")
    (body,) = re.findall(rf"(?m)^{head}.*\n\| ---.*\n((?:\|.*\n)+)", PAGES[page].read_text())
    return [row.strip("| ").split(" | ") for row in body.splitlines()]


# Settings

TABLES: tuple[tuple[str, type[Environment]], ...] = (
    ("operate.md", Settings),
    ("collector.md", CollectorSettings),
)
REQUIRED = {"DATABASE_URL", "REDIS_URL", "COLLECTOR_DATABASE_URL"}
DERIVED = {"MIGRATION_DATABASE_URL", "CONSENTOS_EDITION", "COLLECTOR_READ_DATABASE_URL"}
"""What takes another value where it is not set: the page says which, in words."""


OF_UVICORN = {"FORWARDED_ALLOW_IPS"}
"""Read by the collector's HTTP server itself."""


def documented(page: str) -> dict[str, str]:
    """Return the variables of the page's table, with their defaults."""
    rows = table(page, "variable", "default", "meaning")
    return {name: row[1] for row in rows for name in re.findall(r"`([A-Z_]+)`", row[0])}


@pytest.mark.parametrize(("page", "settings"), TABLES)
def test_a_table_has_every_setting_and_no_other(page: str, settings: type[Environment]) -> None:
    shown = documented(page).keys() - OF_UVICORN
    assert shown == {name.upper() for name in settings.model_fields}


@pytest.mark.parametrize(
    ("page", "name", "default"),
    [
        (page, name.upper(), field.default)
        for page, settings in TABLES
        for name, field in settings.model_fields.items()
    ],
)
def test_a_table_has_the_default_of_a_setting(page: str, name: str, default: Any) -> None:
    shown = documented(page)[name]
    match default:
        case None | "" if name in REQUIRED:
            assert shown == "required"
        case None | "" if name in DERIVED:
            assert shown not in {"required", "not set"}
        case None | "":
            assert shown == "not set"
        case bool():
            assert shown == f"`{str(default).lower()}`"
        case float():
            assert shown == f"`{default:g}`"
        case _:
            assert shown.removesuffix(", with a warning") == f"`{default}`"


# Answers of a receiver

ANSWERS = table("telemetry.md", "answer", "what happens")


def named(cell: str) -> set[int]:
    """Return the HTTP statuses that a cell names, one by one or as a class."""
    hundreds = [int(each) * 100 for each in re.findall(r"(\d)xx", cell)]
    single = {int(each) for each in re.findall(r"\b\d{3}\b", cell)}
    return single.union(*(range(first, first + 100) for first in hundreds))


def test_the_page_names_each_status_that_counts_as_sent_or_is_tried_again() -> None:
    sent, retryable, others = (named(cell) for cell, _ in ANSWERS)
    assert sent == {status for status in range(100, 600) if result_of(status) == "sent"}
    assert retryable == {status for status in range(100, 600) if result_of(status) == "retryable"}
    assert {result_of(status) for status in others} == {"rejected"}


# Events


def logged() -> Iterator[str]:
    """Yield the name of each event that the code logs, now or after a commit."""
    for package in ("app", "workers"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Name("event" | "_event") | ast.Attribute(attr="event"),
                        args=[ast.Constant(str(name)), *_],
                    ) | ast.Tuple([ast.Attribute(ast.Name("logging")), ast.Constant(str(name)), _]):
                        yield name


def test_the_page_names_each_event_that_is_logged() -> None:
    named = {
        re.findall(r"`telemetry\.(\w+)", cell)[0] for cell, _ in table("telemetry.md", "event")
    }
    assert named == {*logged(), "payload"}


# Commands

PROGRAMS = {
    "telemetry": (telemetry, r"(?:python -m app|(?:^|\| )consentos-telemetry) "),
    "collector": (collector, r"python -m app\.collector "),
}
ARGUMENTS = r"""((?:[^|&;>'"`)]|"[^"]*")+)"""
UNFINISHED = {"grants": "--role x", "releases add": "0.4.1 --on 2026-11-06"}
"""What prose leaves out where it only names the command."""

PLACEHOLDERS = {"DAY": "2026-05-02", "FILE": "file", "ID": "0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99"}


def snippets(page: str) -> Iterator[str]:
    """Yield each line of the page's shell examples, then each piece of code in its prose."""
    text = PAGES[page].read_text()
    blocks = re.findall(r"(?ms)^ *```bash\n(.*?)^ *```", text)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        yield line.split("  #")[0]
    prose = re.sub(r"(?ms)^ *```\w*\n.*?^ *```", "", text)
    for code in re.findall(r"`([^`]+)`", prose):
        yield " ".join(code.split())


def commands(page: str, program: str) -> set[str]:
    """Return the arguments of each call of the program that the page shows."""
    cli, call = PROGRAMS[program]
    shown = {each for text in snippets(page) for each in re.findall(call + ARGUMENTS, text)}
    if page == "operate.md" and program == "telemetry":
        names = typer.main.get_group(cli).commands
        shown |= {text for text in snippets(page) if text.split()[:1] and text.split()[0] in names}
    return {each.strip() for each in shown}


def without_effect(group: typer.core.TyperGroup) -> typer.core.TyperGroup:
    """Return the group with commands that take their arguments and do nothing."""
    for command in group.commands.values():
        command.callback = lambda **_: None
        if isinstance(command, typer.core.TyperGroup):
            without_effect(command)
    return group


@pytest.mark.parametrize(
    ("program", "page", "command"),
    [
        (program, page, command)
        for program in PROGRAMS
        for page in PAGES
        for command in sorted(commands(page, program))
    ],
)
def test_the_command_line_accepts_a_command_that_a_page_shows(
    program: str, page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page
    monkeypatch.chdir(tmp_path)
    (tmp_path / PLACEHOLDERS["FILE"]).touch()
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    words += shlex.split(UNFINISHED.get(command.removesuffix(" --apply"), ""))
    without_effect(typer.main.get_group(PROGRAMS[program][0])).main(words, standalone_mode=False)


def test_the_operators_page_shows_every_command_that_an_operator_has() -> None:
    shown = {command.split()[0] for command in commands("operate.md", "telemetry")}
    assert shown == typer.main.get_group(telemetry).commands.keys() - {"schema"}


def test_the_operators_page_has_the_exit_codes_that_the_help_names() -> None:
    rows = table("operate.md", "exit code", "meaning")
    codes = "; ".join(f"{code} {meaning}" for code, meaning in rows).replace("`", "")
    assert f"Exit codes: {codes}." == EXIT_CODES


# Links


def anchors(page: Path) -> set[str]:
    """Return the names under which the headings of a page can be linked."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name
)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
