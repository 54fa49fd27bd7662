"""The recipe of CONTRIBUTING makes a release: one version, everywhere, under its tag."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app import __version__
from tests.support.processes import ROOT, minimal

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
(RECIPE,) = re.findall(r"(?ms)^```bash\n(VERSION=.*?)^```", PAGE)
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()

TOOLS = {
    "make": f'[ "$*" = docs ] && exec {sys.executable} deploy/generate.py',
    "docker": 'echo "$*" > docker.calls',
}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A copy of the checkout in which the recipe was followed."""
    there = tmp_path / "checkout"
    there.mkdir()
    for name in ("app", "deploy"):
        shutil.copytree(ROOT / name, there / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", there / "docs")
    for name in ("CHANGELOG.md", ".gitignore"):
        shutil.copy(ROOT / name, there)
    (there / ".ci").mkdir()
    (there / ".ci" / "run").write_text("touch .ci/passed\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    environment = minimal({"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)})
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    environment["PYTHONPATH"] = f"{there}:{environment['PYTHONPATH']}"
    environment |= {
        f"GIT_{who}_{what}": "nobody@example.com"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    before = "git init -q && git add . && git commit -q -m x && git init -q --bare ../origin.git"
    origin = "git remote add origin ../origin.git"
    subprocess.run(
        ["bash", "-ec", f"{before} && {origin}\n{RECIPE}"],
        cwd=there,
        env=environment,
        check=True,
        capture_output=True,
    )
    return there


def test_the_recipe_gives_every_file_the_version_and_tags_it(released: Path) -> None:
    (version,) = re.findall(r"(?m)^VERSION=(.*)$", RECIPE)
    name = f"consentos-telemetry:{version}"
    assert f'__version__ = "{version}"' in (released / "app" / "__init__.py").read_text()
    deploy = released / "deploy"
    assert f'appVersion: "{version}"' in (deploy / "helm" / "Chart.yaml").read_text()
    assert f":-{version}}}" in (deploy / "compose.yaml").read_text()
    assert (deploy / "kubernetes" / "deployment.yaml").read_text().count(name) == 3
    assert f"\nrelease       {version}\n" in (released / "docs" / "operate.md").read_text()
    changelog = (released / "CHANGELOG.md").read_text()
    heading = rf"## \[Unreleased\]\n\n## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n\n### "
    assert re.search(heading, changelog)
    assert f"--tag {name} ." in (released / "docker.calls").read_text()
    pushed = subprocess.run(
        ["git", "tag", "--list"],
        cwd=released.parent / "origin.git",
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert pushed.stdout == f"{version}\n"


def test_the_package_has_its_version_from_the_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"] == {"path": "app/__init__.py"}


def test_the_changelog_begins_with_what_is_not_released_and_then_names_the_release() -> None:
    first, *releases = re.findall(r"(?m)^## \[(.*)\]", CHANGELOG)
    assert first == "Unreleased"
    assert releases[:1] in ([], [__version__])


def test_the_pages_name_the_python_that_is_needed_and_the_one_that_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    tested = (ROOT / ".python-version").read_text().strip()
    page = (ROOT / "docs" / "operate.md").read_text()
    assert f"| Python | {oldest} to 3.14 | {tested} |" in page
    assert f"Python {oldest} to 3.14," in (ROOT / "README.md").read_text()
