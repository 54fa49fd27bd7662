"""Each mutation of `make prove` fits the code, and the test that must notice it exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache

from tests.prove.mutations import MUTATIONS
from tests.support.processes import ROOT

GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()


@cache
def functions(file: str) -> frozenset[str]:
    """Return the names of all functions and methods in a file of the tests."""
    found = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
    return frozenset(each.name for each in found if isinstance(each, ast.FunctionDef))


def misfits() -> Iterator[str]:
    """Yield what is wrong with each mutation that does not fit."""
    for mutation in MUTATIONS:
        code = ROOT / mutation.file
        matches = code.read_text().count(mutation.old) if code.exists() else 0
        if matches != 1:
            yield f"{mutation.breaks}: {mutation.file} has {matches} times {mutation.old!r}"
        file, name = mutation.noticed_by.split("::")
        if not (ROOT / "tests" / file).exists() or name not in functions(file):
            yield f"{mutation.breaks}: there is no test {mutation.noticed_by}"
        if not re.search(rf"\b{name}\b", GUARANTEES):
            yield f"{mutation.breaks}: docs/guarantees.md does not name {name}"


def test_each_mutation_fits_the_code_and_names_a_test_that_exists() -> None:
    assert list(misfits()) == []


def test_no_two_mutations_are_the_same() -> None:
    changes = [(each.file, each.old, each.new) for each in MUTATIONS]
    assert len(set(changes)) == len(changes)
