"""Break each promise on purpose, in a copy of the project, and check that a test fails.

Each mutation changes one place of the code. The test that docs/guarantees.md names for the promise
must pass before the change and fail after it.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
from rich.console import Console

from demo import servers
from tests.prove.mutations import MUTATIONS, Mutation
from tests.support import warm
from tests.support.room import room

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*")
COPIES = 6
"""Copies that are tested at the same time, each with servers of its own."""

ALL_PASSED = 0
"""Pytest's exit code."""

SECONDS = count(1)
"""Modification times of files. None is used twice."""

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(warm.READ_FIRST)}
"""So pytest can be a fork, and modules are compiled once for each copy."""

FAILED = re.compile(r"\d failed")
"""Pytest prints this about a test that failed, but not about one whose setup failed."""


@dataclass(frozen=True)
class Verdict:
    """The result of one mutation."""

    mutation: Mutation
    noticed: bool
    seconds: float
    said: str


@dataclass(frozen=True)
class Copy:
    """A copy of the project, with the addresses of servers that its tests share."""

    path: Path
    lent: Mapping[str, str]


@contextmanager
def copied(path: Path) -> Iterator[Copy]:
    """Copy the project and run servers for the copy until the block ends."""
    shutil.copytree(ROOT, path, ignore=NOT_COPIED)
    with servers.running(path / ".data" / "lent") as started:
        lent = {"TEST_DATABASE_URL": started.postgres, "TEST_REDIS_URL": started.redis}
        yield Copy(path, lent)


def run(
    copy: Path, *tests: str, options: str, lent: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run tests, named ``file::name``, in a copy; return pytest's exit code and last words.

    They run on the servers at the addresses in ``lent``, or else start their own.
    """
    pairs = [test.split("::") for test in tests]
    files = sorted({f"tests/{file}" for file, _ in pairs})
    names = " or ".join(name for _, name in pairs)
    ended = warm.pytest(
        ["-q", "--tb=line", *options.split(), *files, "-k", names],
        {**ENVIRONMENT, **(lent or {})},
        directory=copy,
    )
    return ended.returncode, ended.stdout[-2000:]


def write(file: Path, code: str) -> None:
    """Write code with a modification time that no other version of the file has.

    Python compares only this time, in whole seconds, and the size to see if compiled code is valid.
    """
    file.write_text(code)
    second = next(SECONDS)
    os.utime(file, (second, second))


@contextmanager
def mutated(copy: Path, mutation: Mutation) -> Iterator[None]:
    """Break the copy in one place until the block ends."""
    file = copy / mutation.file
    code = file.read_text()
    if code.count(mutation.old) != 1:
        raise LookupError(f"{mutation.file} does not have exactly once: {mutation.old.strip()}")
    write(file, code.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        write(file, code)


SKIPPED = re.compile(r"\d skipped")
"""Pytest prints this about a test that needs servers of its own, such as one that kills them."""


def judge(mutation: Mutation, copies: SimpleQueue[Copy]) -> Verdict:
    """Run the mutation's test on a copy that no other thread uses."""
    copy, started = copies.get(), time.monotonic()
    test, options = mutation.noticed_by, "-x --numprocesses=0 --timeout=30"
    try:
        with mutated(copy.path, mutation):
            said = ""
            if not test.startswith("faults/"):
                _, said = run(copy.path, test, options=options, lent=copy.lent)
            if not said or (SKIPPED.search(said) and not FAILED.search(said)):
                _, said = run(copy.path, test, options=options)
    except LookupError as error:
        said = str(error)
    finally:
        copies.put(copy)
    return Verdict(mutation, bool(FAILED.search(said)), time.monotonic() - started, said)


def require_passed(tests: set[str], copies: SimpleQueue[Copy], console: Console) -> None:
    """Run tests on the unchanged code, and exit with 1 if one fails."""
    with console.status(f"{len(tests)} tests on the unchanged code"):
        copy = copies.get()
        before, said = run(copy.path, *tests, options=f"--numprocesses={COPIES}")
        if before != ALL_PASSED:  # alone, as each test is when something is broken
            before, said = run(copy.path, *tests, options="--numprocesses=0 --last-failed")
        copies.put(copy)
    if before != ALL_PASSED:
        console.print(f"The tests fail without any mutation:\n{said}")
        raise typer.Exit(1)


def prove(
    words: Annotated[
        str, typer.Argument(help="Run only mutations whose description contains these words.")
    ] = "",
    *,
    passed: Annotated[
        bool,
        typer.Option("--passed", help="The tests have just passed: do not run them unchanged."),
    ] = False,
) -> None:
    """Break each promise on purpose, in a copy of the project, and check that a test fails.

    Exits 0 if every mutation is noticed, 1 if one is not.
    """
    console = Console(highlight=False, soft_wrap=True)
    chosen = [mutation for mutation in MUTATIONS if words in mutation.breaks]
    if not chosen:
        console.print(f"No mutation's description contains {words!r}.")
        raise typer.Exit(2)
    with (
        tempfile.TemporaryDirectory(prefix="prove-", dir=room()) as directory,
        ExitStack() as started,
    ):
        Path(directory).chmod(0o755)  # as root, Postgres runs as a user of its own
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(COPIES):
            copies.put(started.enter_context(copied(Path(directory, str(number)))))
        if not passed:
            require_passed({mutation.noticed_by for mutation in chosen}, copies, console)
        missed = 0
        with ThreadPoolExecutor(COPIES) as threads:
            for verdict in threads.map(lambda mutation: judge(mutation, copies), chosen):
                mutation = verdict.mutation
                mark = "✓" if verdict.noticed else "✗"
                console.print(
                    f"{mark} promise {mutation.promise}: {mutation.breaks}"
                    f" ({verdict.seconds:.1f} s)"
                )
                if not verdict.noticed:
                    missed += 1
                    console.print(f"  NOT noticed by {mutation.noticed_by}:\n{verdict.said}")
    console.print(f"{len(chosen) - missed} of {len(chosen)} mutations were noticed.")
    raise typer.Exit(bool(missed))


if __name__ == "__main__":
    typer.run(prove)
