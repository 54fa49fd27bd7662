"""Writes the Deployment for kustomize from the Helm chart, which is the source."""  # noqa: INP001

from pathlib import Path
from typing import Any

import helm_python
import yaml

DEPLOY = Path(__file__).parent
CHART = DEPLOY / "helm"
DEPLOYMENT = DEPLOY / "kubernetes" / "deployment.yaml"

RELEASE = "consentos-telemetry"
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


if __name__ == "__main__":
    DEPLOYMENT.write_text(deployment())
