"""Write all rules of deploy/prometheus/rules as one PrometheusRule for its operator: `make manifests`."""

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
RULES = DEPLOY / "prometheus" / "rules"
WRITTEN = DEPLOY / "k8s" / "components" / "monitoring" / "prometheusrule.yaml"
HEAD = "# Written by `make manifests` from deploy/prometheus/rules: change it there.\n"


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as one."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def document() -> str:
    """The whole file."""
    files = sorted(RULES.glob("*.yml"))
    groups: list[Any] = [
        group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    ]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "anytime", "labels": {"app.kubernetes.io/name": "anytime"}},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.dump(rule, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


if __name__ == "__main__":
    WRITTEN.write_text(document(), encoding="utf-8")
