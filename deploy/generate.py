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
DEPLOYMENT = DEPLOY / "kubernetes" / "deployment.yaml"

RELEASE = "consentos-telemetry"

VERSIONED: Mapping[Path, str] = {
    CHART / "Chart.yaml": r'(?m)^((?:v|appV)ersion: "?)[^\s"]+',
    DEPLOY.parent / "README.md": r"(?m)^(release +)\S+$",
    DEPLOY / "compose.yaml": r"(\$\{CONSENTOS_TELEMETRY_TAG:-)[^}]+",
}
"""The files that name the release, and where: the version comes after the group."""

HEADER = """\
# Generated from deploy/helm by `make docs`. Change the chart, not this file.
"""


def rendered(**values: object) -> dict[str, Any]:
    """Return what Helm makes of the chart with these values, by the kind of each object.

    Raises:
        helm_python.HelmError: the chart refuses the values.
    """
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=RELEASE, namespace="consentos")
    objects = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
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
