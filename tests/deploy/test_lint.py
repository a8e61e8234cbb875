"""Shell and YAML, which the type checker and the linter of Python do not see."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent


def written(*patterns: str) -> list[Path]:
    """Files of the repository that match, but for what tools keep and templates that are no YAML yet."""
    found = [
        path for pattern in patterns for path in (*ROOT.glob(pattern), *(ROOT / "deploy").rglob(pattern))
    ]
    return sorted(path for path in found if "templates" not in path.parts)


def test_yaml_is_as_it_should_be() -> None:
    files = written("*.yml", "*.yaml")

    linted = subprocess.run(
        [TOOLS / "yamllint", "--strict", "-c", ROOT / ".yamllint", *files],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert files
    assert (linted.returncode, linted.stdout) == (0, "")


def test_shell_scripts_are_as_they_should_be() -> None:
    scripts = [ROOT / ".ci" / "run", *written("*.sh")]

    linted = subprocess.run(
        [TOOLS / "shellcheck", *scripts], capture_output=True, text=True, timeout=50, check=False
    )

    assert (linted.returncode, linted.stdout) == (0, "")
