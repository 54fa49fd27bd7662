"""Writes the generated parts of the deploy files: the version, and the Deployment for kustomize.

The version comes from `app.__version__`, the Deployment from the Helm chart.
"""  # noqa: INP001 - a script; deploy/ is not a package

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

from app import __version__

DEPLOY = Path(__file__).parent
CHART = DEPLOY / "helm"
COLLECTOR = DEPLOY / "collector"
DEPLOYMENT = DEPLOY / "kubernetes" / "deployment.yaml"

VERSIONED: Mapping[Path, str] = {
    **dict.fromkeys(
        (CHART / "Chart.yaml", COLLECTOR / "helm" / "Chart.yaml"),
        r'(?m)^((?:v|appV)ersion: "?)[^\s"]+',
    ),
    DEPLOY.parent / "docs" / "operate.md": r"(?m)^(release +)\S+$",
    **dict.fromkeys(
        (DEPLOY / "compose.yaml", COLLECTOR / "compose.yaml"),
        r"(\$\{CONSENTOS_TELEMETRY_TAG:-)[^}]+",
    ),
}
"""The files that contain the version, each with a pattern: the version follows its group."""

HEADER = """\
# Generated from deploy/helm by `make docs`. Change the chart, not this file.
"""


def rendered(directory: Path = CHART, /, **values: object) -> dict[str, Any]:
    """Return the objects that Helm renders from a chart with these values, by their kind.

    Raises:
        helm_python.HelmError: the values do not match the chart's schema.
    """
    name = yaml.safe_load((directory / "Chart.yaml").read_text())["name"]
    with helm_python.Chart.load(directory) as chart:
        files = chart.render(values, name=name, namespace="consentos")
    pages = [text for file, text in files.items() if file.endswith(".yaml")]
    objects = [each for page in pages for each in yaml.safe_load_all(page) if each]
    return {each["kind"]: each for each in objects}


def deployment() -> str:
    """Return the text of the kustomization's Deployment.

    It is the chart's Deployment without labels and checksum: kustomize adds the labels, and puts a
    hash of the values into the ConfigMap's name.
    """
    found = rendered()["Deployment"]
    del (
        found["metadata"]["labels"],
        found["spec"]["selector"],
        found["spec"]["template"]["metadata"],
    )
    return HEADER + yaml.safe_dump(found, sort_keys=False, width=100)


def with_version(file: Path) -> str:
    """Return the text of a file with each version in it replaced by the current one.

    Raises:
        ValueError: the file contains no version.
    """
    written, count = re.subn(VERSIONED[file], rf"\g<1>{__version__}", file.read_text())
    if not count:
        raise ValueError(f"{file} contains no version")
    return written


if __name__ == "__main__":
    for versioned in VERSIONED:
        versioned.write_text(with_version(versioned))
    DEPLOYMENT.write_text(deployment())
