"""What the project promises about itself: import rules that bite, repeatable installs, true documents."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from service.settings import Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "service", "loadtests")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


# ---- the import rules ----

SKELETON = {
    "model": (
        *("__init__", "fractalnet", "droppath", "data", "replay", "recipe", "train"),
        *("calibrate", "reproduce", "speed", "ablate", "export", "evaluate"),
    ),
    "loadtests": ("__init__", "arrivals", "simulate", "report"),
    "service": (
        *("__init__", "__main__", "serving", "client", "inspection"),
        *("api", "streaming", "page", "exchange", "oip", "oip_http", "oip_grpc", "oip_pb2"),
        *("protocol", "access", "repository", "models", "profiling", "engine"),
        *("logs", "tracing", "record"),
        *("inference", "providers", "metrics", "errors", "health", "settings", "decoding", "gpu", "series"),
        "turns",
        *("policies", "scheduling", "waiting", "containers", "wire", "ladder", "latency"),
    ),
}
PURE = ("policies", "scheduling", "waiting", "ladder", "latency")

# import-linter refuses an exception that nothing needs, so this one is always made.
ALWAYS = {"loadtests.simulate": "".join(f"import service.{module}\n" for module in PURE)}


def lint(tree: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run this project's import rules on a tree of empty modules with one line added to some of them."""
    (tree / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for package, modules in SKELETON.items():
        (tree / package).mkdir()
        for module in modules:
            (tree / package / f"{module}.py").write_text(
                ALWAYS.get(f"{package}.{module}", "") + extra.get(f"{package}.{module}", "")
            )
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    return subprocess.run(
        [sys.executable, "-c", command], cwd=tree, capture_output=True, text=True, check=False, timeout=50
    )


def test_the_import_rules_allow_the_way_the_layers_point(tmp_path: Path) -> None:
    linted = lint(
        tmp_path,
        **{
            "service.__main__": "import service.serving, service.client, service.inspection",
            "service.serving": "import service.api, service.repository, uvicorn",
            "service.client": "import httpx",
            "service.inspection": "import service.models, service.inference",
            "service.api": "import service.streaming, service.engine, fastapi",
            "service.streaming": "import service.exchange, service.models, asyncio",
            "service.repository": "import service.models, service.metrics",
            "service.models": "import service.profiling, service.record, service.decoding",
            "service.tracing": "import service.access, service.record, opentelemetry",
            "service.logs": "import service.models, service.record",
            "service.record": "import service.engine, service.metrics",
            "service.exchange": "import service.protocol, service.models",
            "service.oip_http": "import service.oip, service.exchange, service.repository, fastapi",
            "service.oip_grpc": "import service.oip, service.oip_pb2, service.repository, grpc",
            "service.oip": "import service.models, service.errors, numpy",
            "service.decoding": "import service.containers, service.errors, numpy",
            "service.wire": "import service.errors",
            "service.protocol": "import service.access, service.settings, uvicorn",
            "service.engine": "import service.inference, service.metrics, asyncio",
            "service.inference": "import service.ladder, service.providers, onnxruntime, numpy",
            "service.providers": "import service.ladder, onnxruntime, numpy",
            "service.settings": "import service.policies",
            "service.policies": "import service.scheduling",
            "service.scheduling": "import service.waiting, collections, dataclasses, math",
            "service.waiting": "import service.ladder, service.latency, bisect",
            "loadtests.simulate": "import loadtests.report, numpy, time",
            "model.evaluate": "import model.export, model.calibrate, model.data",
            "model.ablate": "import model.reproduce, model.train",
            "model.reproduce": "import model.calibrate, model.train",
            "model.train": "import torch, onnx, model.recipe, model.droppath",
            "model.recipe": "import model.data, model.fractalnet",
        },
    )

    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("model.train", "service.errors"),
        ("model.train", "loadtests.arrivals"),
        ("service.api", "model.fractalnet"),
        ("service.api", "loadtests.arrivals"),
        ("loadtests.arrivals", "model.train"),
        ("loadtests.arrivals", "service.scheduling"),
        ("loadtests.report", "service.scheduling"),
        ("loadtests.report", "service.ladder"),
        ("loadtests.simulate", "service.engine"),
        ("loadtests.simulate", "service.errors"),
        ("service.scheduling", "loadtests.simulate"),
        ("service.inference", "torch"),
        ("service.decoding", "torchvision"),
        ("service.inference", "onnx"),
        *((f"service.{module}", "time") for module in PURE),
        *((f"service.{module}", "numpy") for module in PURE),
        ("service.scheduling", "asyncio"),
        ("service.scheduling", "fastapi"),
        ("service.scheduling", "onnxruntime"),
        ("service.scheduling", "prometheus_client"),
        ("service.scheduling", "service.policies"),
        ("service.waiting", "service.scheduling"),
        ("service.ladder", "service.waiting"),
        ("service.latency", "service.ladder"),
        ("service.policies", "service.settings"),
        ("service.api", "service.__main__"),
        ("service.api", "service.serving"),
        ("service.client", "service.serving"),
        ("service.engine", "service.api"),
        ("service.engine", "service.oip"),
        ("service.engine", "service.profiling"),
        ("service.models", "service.repository"),
        ("service.models", "service.logs"),
        ("service.repository", "service.tracing"),
        ("service.record", "service.tracing"),
        ("service.engine", "service.record"),
        ("service.repository", "service.exchange"),
        ("service.exchange", "service.streaming"),
        ("service.oip", "service.oip_http"),
        ("service.oip", "service.exchange"),
        ("service.oip_http", "service.oip_grpc"),
        ("service.oip_grpc", "service.api"),
        ("service.metrics", "service.engine"),
        ("service.providers", "service.inference"),
        ("service.providers", "service.settings"),
        ("service.errors", "service.metrics"),
        ("service.series", "service.errors"),
        ("service.gpu", "service.metrics"),
        ("service.containers", "service.wire"),
        ("service.errors", "service.wire"),
        ("service.access", "service.protocol"),
        ("service.access", "service.models"),
        ("service.protocol", "service.repository"),
        ("model.fractalnet", "model.droppath"),
        ("model.train", "model.calibrate"),
        ("model.calibrate", "model.export"),
        ("model.train", "model.reproduce"),
        ("model.recipe", "model.train"),
        ("model.reproduce", "model.ablate"),
        ("model.replay", "model.train"),
        ("service.scheduling", "service.inference"),
    ],
)
def test_the_import_rules_refuse(tmp_path: Path, module: str, imported: str) -> None:
    linted = lint(tmp_path, **{module: f"import {imported}"})

    assert linted.returncode == 1
    assert re.search(rf"{re.escape(module)} -> {re.escape(imported)} ", linted.stdout), linted.stdout


# ---- the installation ----


def extras() -> dict[str, list[str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return dict(tomllib.load(file)["project"]["optional-dependencies"])


def pins() -> dict[str, SpecifierSet]:
    """What constraints.txt says for this platform, by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        canonicalize_name(pin.name): pin.specifier
        for pin in parsed
        if pin.marker is None or pin.marker.evaluate()
    }


def closure(roots: list[str]) -> set[str]:
    """Every distribution that installing these requirements brings to this platform."""
    waiting, seen = [Requirement(root) for root in roots], set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key in seen or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                continue
            seen.add(key)
            for line in importlib.metadata.requires(requirement.name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    needed.marker = None
                    waiting.append(needed)
    return {name for name, _ in seen}


@pytest.mark.parametrize("extra", ["serve", "train", "load", "dev"])
def test_every_package_that_an_extra_brings_is_pinned_and_installed_as_pinned(extra: str) -> None:
    pinned = pins()

    brought = closure(extras()[extra])

    assert brought - set(pinned) == set()
    assert {name for name in brought if importlib.metadata.version(name) not in pinned[name]} == set()


def test_constraints_are_exact() -> None:
    assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", str(specifier)) for specifier in pins().values())


def test_serving_installs_no_training_stack() -> None:
    assert (
        closure(extras()["serve"]) & {"torch", "torchvision", "onnx", "onnxscript", "locust", "matplotlib"}
        == set()
    )


def test_training_installs_no_web_server() -> None:
    assert (
        closure(extras()["train"]) & {"fastapi", "starlette", "uvicorn", "locust", "prometheus-client"}
        == set()
    )


@pytest.mark.parametrize("module", ["service.inference", "model.export", "loadtests.offline"])
def test_nobody_is_told_about_who_uses_this(module: str, tmp_path: Path) -> None:
    """ONNX Runtime keeps the name that it gives the machine, and what it has yet to report, in a cache."""
    environ = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    for command in ("import onnxruntime", f"import {module}"):
        subprocess.run([sys.executable, "-c", command], env=environ, check=True, timeout=50, cwd=tmp_path)
        reports = [path for path in tmp_path.rglob("*onnxruntime*") if path.is_dir()]
        assert bool(reports) == (command == "import onnxruntime"), reports
        for path in reports:
            shutil.rmtree(path)


# ---- the documents ----


def written_files() -> list[Path]:
    """Every file that people write, as far as it is text."""
    folders = (*PACKAGES, "tests", "deploy", "docs", ".ci")
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    binary = {".onnx", ".png", ".jpg", ".webp", ".pyc", ".gif", ".ico", ".pdf"}
    return [path for path in found if path.suffix not in binary]


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    somebodys = re.compile(r"(?<![\w.$}-])/(?:home|root|work|Users|tmp)/\w|file:/{3}")

    found = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in written_files()
        for match in somebodys.finditer(path.read_text(encoding="utf-8"))
    }

    assert found == set()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", [*DOCUMENTS, ".ci/run"])
def test_every_make_target_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    code = [text] if name == ".ci/run" else re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)

    named = {target for piece in code for target in re.findall(r"\bmake ([a-z-]+)", piece)}

    assert named - make_targets() == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))

    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def limits() -> list[tuple[str, str, str]]:
    """The rows of the tables in SECURITY.md that name a test: what, default, test."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (.+?) \| (.*?) ?\| .+? \| `(tests/\S+)` \|$", text, re.MULTILINE)


def test_every_limit_names_a_test_that_there_is() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert len(limits()) == text.count("`tests/"), "a row is not of the form that is checked here"

    missing = []
    for _, _, node in limits():
        path, _, name = node.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        if name not in {child.name for child in tree.body if isinstance(child, functions)}:
            missing.append(node)

    assert missing == []


def test_every_limit_is_a_setting_with_that_default_and_every_bound_is_a_limit() -> None:
    fields = {name: field.default for name, field in Settings.model_fields.items()}
    rows = [(setting, default) for what, default, _ in limits() for setting in re.findall(r"`(\w+)`", what)]
    bounds = {name for name in fields if name.startswith("max_") or name.endswith("_timeout_s")}

    assert [setting for setting, _ in rows if setting not in fields] == []
    assert bounds - {setting for setting, _ in rows} == set()
    assert [
        (setting, default)
        for setting, default in rows
        if (default != str(fields[setting]) if fields[setting] else not re.match("none|0", default))
    ] == []


def test_continuous_integration_proves_what_a_contributor_proves() -> None:
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    assert {"test", "check", "faults"} <= set(re.findall(r"^ *make ([a-z]+)", commands, re.MULTILINE))


def test_the_changelog_speaks_of_this_version() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]

    assert re.search(
        rf"^## \[(?:Unreleased|{re.escape(version)})\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


# ---- the words ----


def test_no_module_or_class_has_a_name_that_says_nothing() -> None:
    empty_module = re.compile(r"utils?|common|base|helpers?|misc")
    empty_class = re.compile(r"\w*(?:Manager|Handler|Helper|Util|Utils|Base|Data|Info)")
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]

    modules = [path.name for path in sources if empty_module.fullmatch(path.stem)]
    classes = [
        f"{path.name}: {node.name}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and empty_class.fullmatch(node.name)
    ]

    assert modules + classes == []
