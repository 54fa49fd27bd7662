"""The check of the prose finds the phrases that made readers stop, and no plain sentence."""

import runpy

import pytest

from tests.support.processes import ROOT

PROSE = runpy.run_path(str(ROOT / "docs" / "prose.py"))


def found(text: str, kind: str = ".md") -> list[str]:
    return [message.split(" → ")[0] for _, message in PROSE["find"](text, kind)]


@pytest.mark.parametrize(
    ("sentence", "phrase"),
    [
        ("One heartbeat a day, which names nobody, from a self-hosted ConsentOS", "names nobody"),
        ("a separate actor sends what stands there.", "what stands"),
        ("makes a role under which Postgres itself refuses all else", "all else"),
        ("Where the Redis has a certificate of its own making", "of its own making"),
        ("1 for could not or not as it should be", "as it should be"),
        ("and so does anything that cannot be understood.", "cannot be understood"),
        ("the install's own second lies within so much of 02:30", "so much of"),
        ("one that exists keeps its own.", "keeps its own"),
        ("have somebody make it who may, and run it again.", "who may"),
        ("It only gives.", "only gives"),
        ("What the role has beyond that is told, and told again in `status`.", "told"),
        ("Do write the word: YAML takes a line without a value for unset", "Do write"),
        ("they alone get the Secret", "they alone"),
        ("A heartbeat that was refused are no reasons", "are no reasons"),
        ("; nor is what keeps it from knowing", "nor is what"),
        ("Where that comes every day, the other one is still on.", "Where that comes"),
        ("`DROP OWNED` takes back what the role was granted", "takes back what"),
        ("It tells that two heartbeats come from the same install.", "tells"),
        ("It is derived from nothing", "derived from nothing"),
        ("unless somebody knows by another way whose it is.", "whose it is"),
        ("one added with an older date would take its place", "would take its place"),
        ("to delete what is under it, and nobody has to be asked", "nobody has to be asked"),
        ("zero is nobody's secret", "nobody's"),
        ("It has the outbox to itself", "has the outbox to itself"),
        ("and then asks once more who the install is", "asks once more"),
        ("of what was counted neither is what was sent", "neither is what"),
        ("it shows, in its turn, the page", "in its turn"),
        ("A database is none of these.", "is none of"),
        ("Measure what it costs, beside other ways", "beside"),
        ("The role is\nto be created", "is to be"),
    ],
)
def test_a_sentence_that_has_to_be_read_twice_is_found(sentence: str, phrase: str) -> None:
    assert phrase in [" ".join(each.split()) for each in found(sentence)]


@pytest.mark.parametrize(
    "sentence",
    [
        "Sends one anonymous heartbeat a day from a self-hosted ConsentOS.",
        "One background job writes the heartbeat to the table; another sends it from there.",
        "If Redis uses a self-signed certificate, add a `.profile`.",
        "So does any setting that cannot be parsed.",
        "`grants` never revokes. If the role has further rights, `status` lists them.",
        "Do not leave the value empty: compose then leaves the variable unset.",
        "A standby stands for a second server, and an understanding is outstanding.",
        "It shows that two heartbeats came from the same install.",
        "Anyone who knows the id may delete its data; no further proof is asked for.",
        "`forget` locks the outbox. 0 is shown as 0.",
        "Quote it as code: `what stands there`.",
        "```\nwhat stands there is told\n```",
    ],
)
def test_a_plain_sentence_and_code_are_not_found(sentence: str) -> None:
    assert found(sentence) == []


SOURCE = '''
def test_who_is_told_what(told):
    """A reader is told."""
    tell = f"{told} is told"  # it is told
'''


def test_comments_and_strings_of_code_are_read_and_its_names_are_not() -> None:
    assert found(PROSE["of_code"](SOURCE), ".py") == ["told"] * 3


def test_of_the_tests_their_names_are_read() -> None:
    assert found(PROSE["of_code"](SOURCE, names_only=True), ".py") == ["told"]


def test_a_finding_has_its_file_its_line_and_what_to_write_instead() -> None:
    (line,) = PROSE["report"]([(ROOT / "README.md", "One\ntwo, beside three\n")])
    assert line == "README.md:2: beside → compared with, or next to"
