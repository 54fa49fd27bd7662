"""Find phrases that a reader has to read twice: ``python docs/prose.py``.

proselint looks for the phrases of prose.toml, and for some that it has itself, in the pages, the
templates, the docstrings, comments and strings of the code, and the names of the tests. Code is
exempt: the blocks and `spans` of a page and of a comment.
"""  # noqa: INP001 - a program, and not a package

import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from proselint.checks import archaism, needless_variants, nonwords
from proselint.registry.checks import Check
from proselint.registry.checks.types import PreferredForms

ROOT = Path(__file__).parents[1]
PACKAGES = ("app", "workers", "migrations", "demo")
LANDED = re.compile(r"migrations/\w+/\d{4}_")
"""A migration that may have run somewhere is never changed, not even a word of it."""

NOT_PROSE = {
    ".md": r"^```.*?^```|`[^`]*`|\]\([^)]*\)|<!--.*?-->",
    ".html": r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}|<[^>]*>",
    ".py": r"``[^`]*``|`[^`\n]*`|\{[^{}\n]*\}",
}
"""The parts of each kind of file that are code."""

PHRASES = tomllib.loads((ROOT / "docs" / "prose.toml").read_text())["instead"]
CHECKS = (
    Check(
        PreferredForms({key.replace(" ", r"\s+"): value for key, value in PHRASES.items()}),
        path="prose.toml",
        message="{1} → {0}",
    ),
    *archaism.__register__,
    *needless_variants.__register__,
    *nonwords.__register__,
)


def find(text: str, kind: str = ".md") -> Iterator[tuple[int, str]]:
    """Yield the position and the description of each phrase in a text."""
    text = re.sub(NOT_PROSE[kind], _blank, text, flags=re.DOTALL | re.MULTILINE)
    for check in CHECKS:
        for found in check.check_with_flags(text):
            yield found.span[0], " ".join(found.message.split())


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", "~", match[0])


def of_code(source: str, *, names_only: bool = False) -> str:
    """Return Python's comments and strings, or its tests' names, each at its place."""
    lines = [[" "] * len(line) for line in source.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = token.type == tokenize.NAME and token.string.startswith("test_")
        if not (name if names_only else token.type in _TEXT):
            continue
        words = token.string.replace("_", " ") if name else token.string.replace("#", " ")
        row, column = token.start
        for number, part in enumerate(words.split("\n")):
            start = 0 if number else column
            lines[row - 1 + number][start : start + len(part)] = part
    return "\n".join("".join(line) for line in lines)


_TEXT = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def texts() -> Iterator[tuple[Path, str]]:
    """Yield each file that people read, with the text to check in it."""
    for pages in ("*.md", "docs/*.md", "deploy/**/*.md"):
        for page in sorted(ROOT.glob(pages)):
            yield page, page.read_text()
    for package in PACKAGES:
        for template in sorted((ROOT / package).rglob("*.html")):
            yield template, template.read_text()
        for module in sorted((ROOT / package).rglob("*.py")):
            if not LANDED.match(str(module.relative_to(ROOT))):
                yield module, of_code(module.read_text())
    for tests in sorted((ROOT / "tests").rglob("test_*.py")):
        yield tests, of_code(tests.read_text(), names_only=True)


def report(files: Iterable[tuple[Path, str]]) -> Iterator[str]:
    """Yield one line for each phrase that is found."""
    for file, text in files:
        for position, message in sorted(find(text, file.suffix)):
            yield f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, position) + 1}: {message}"


if __name__ == "__main__":
    lines = list(report(texts()))
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.exit(f"{len(lines)} phrases to write plainly." if lines else 0)
