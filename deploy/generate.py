"""Writes what the deploy files derive: the release's version, and the Deployment for kustomize.

`app.__version__` is the source of the version, and the Helm chart that of the Deployment.
"""  # noqa: INP001

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
"""The files that name the release, and where: the version comes after the group."""

HEADER = """\
# Generated from deploy/helm by `make docs`. Change the chart, not this file.
"""


def rendered(directory: Path = CHART, /, **values: object) -> dict[str, Any]:
    """Return what Helm makes of a chart with these values, by the kind of each object.

    Raises:
        helm_python.HelmError: the chart refuses the values.
    """
    name = yaml.safe_load((directory / "Chart.yaml").read_text())["name"]
    with helm_python.Chart.load(directory) as chart:
        files = chart.render(values, name=name, namespace="consentos")
    pages = [text for file, text in files.items() if file.endswith(".yaml")]
    objects = [each for page in pages for each in yaml.safe_load_all(page) if each]
    return {each["kind"]: each for each in objects}


def deployment() -> str:
    """Return the text of the kustomization's Deployment.

    It is the chart's without labels and without the checksum: kustomize adds labels, and names the
    ConfigMap by a hash of its values.
    """
    found = rendered()["Deployment"]
    del (
        found["metadata"]["labels"],
        found["spec"]["selector"],
        found["spec"]["template"]["metadata"],
    )
    return HEADER + yaml.safe_dump(found, sort_keys=False, width=100)


def with_version(file: Path) -> str:
    """Return the text of a file with the release's version wherever it names one.

    Raises:
        ValueError: it names none.
    """
    written, count = re.subn(VERSIONED[file], rf"\g<1>{__version__}", file.read_text())
    if not count:
        raise ValueError(f"{file} names no version")
    return written


if __name__ == "__main__":
    for versioned in VERSIONED:
        versioned.write_text(with_version(versioned))
    DEPLOYMENT.write_text(deployment())
