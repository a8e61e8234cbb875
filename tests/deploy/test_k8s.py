"""What kubectl builds of deploy/k8s is valid, hardened, consistent in itself, and true to the server."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.k8s import prometheusrule
from service.access import is_probe
from service.models import CPU_BATCH_SIZES, GPU_BATCH_SIZES
from service.settings import PREFIX, Settings
from tests.deploy import queries
from tests.deploy.test_rules import RECORDED

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "k8s"
OVERLAYS = ("cpu", "gpu")
BUILDS = ("base", *(f"overlays/{name}" for name in OVERLAYS))
VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The oldest cluster that has all that is used, and the newest whose schemas are here."""

kubectl = shutil.which("kubectl")
promtool = shutil.which("promtool")
pytestmark = pytest.mark.skipif(kubectl is None, reason="needs kubectl, whose kustomize builds the manifests")

CUSTOM = {
    "ServiceMonitor": "jobLabel selector endpoints sampleLimit",
    "PrometheusRule": "groups",
    "ScaledObject": "scaleTargetRef minReplicaCount maxReplicaCount pollingInterval triggers advanced",
}
"""Kinds that a cluster learns from operators, with the fields of their spec that are used here."""

Object = dict[str, Any]


@cache
def built(path: str) -> tuple[Object, ...]:
    assert kubectl
    done = subprocess.run(
        [kubectl, "kustomize", FOLDER / path], capture_output=True, text=True, check=False, timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")
    return tuple(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def keda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Object, ...]]:
    """The overlays with KEDA in the place of the autoscaler, as their comment has it."""
    root = tmp_path_factory.mktemp("k8s")
    shutil.copytree(FOLDER, root, dirs_exist_ok=True)
    for name in OVERLAYS:
        path = root / "overlays" / name / "kustomization.yaml"
        text = path.read_text(encoding="utf-8")
        assert "../../components/hpa  # or ../../components/keda" in text
        path.write_text(text.replace("../../components/hpa", "../../components/keda"), encoding="utf-8")
    return {f"{name}-keda": built(str(root / "overlays" / name)) for name in OVERLAYS}


def the(objects: tuple[Object, ...], kind: str, name: str = "anytime") -> Object:
    (found,) = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def pod(objects: tuple[Object, ...]) -> Object:
    spec: Object = the(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(objects: tuple[Object, ...]) -> Object:
    (found,) = pod(objects)["containers"]
    assert isinstance(found, dict)
    return found


def settings(objects: tuple[Object, ...]) -> dict[str, str]:
    """The server's environment as far as it is written here."""
    (reference,) = container(objects)["envFrom"]
    chosen: dict[str, str] = the(objects, "ConfigMap", reference["configMapRef"]["name"])["data"]
    return chosen


every_build = pytest.mark.parametrize("path", BUILDS)


# ---- as Kubernetes reads them ----


@every_build
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(path: str, version: str) -> None:
    for one in built(path):
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


def test_every_object_of_an_operator_has_only_fields_that_it_knows(keda: dict[str, Any]) -> None:
    custom = [
        one for objects in (*map(built, BUILDS), *keda.values()) for one in objects if one["kind"] in CUSTOM
    ]

    assert {one["kind"] for one in custom} == set(CUSTOM)
    for one in custom:
        assert set(one["spec"]) <= set(CUSTOM[one["kind"]].split())


def test_the_base_needs_nothing_that_a_cluster_may_lack() -> None:
    groups = {one["apiVersion"].rpartition("/")[0] for one in built("base")}

    assert groups <= {"", "apps", "policy", "networking.k8s.io"}


@every_build
def test_everything_is_in_one_namespace_whose_pods_are_restricted(path: str) -> None:
    objects = built(path)

    names = {one["metadata"].get("namespace") for one in objects if one["kind"] != "Namespace"}
    assert names == {"anytime"}
    labels = the(objects, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


# ---- hardened ----


@every_build
def test_pods_may_do_nothing_that_they_need_not(path: str) -> None:
    spec, one = pod(built(path)), container(built(path))

    assert spec["automountServiceAccountToken"] is False
    assert the(built(path), "ServiceAccount")["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert {kind for volume in spec["volumes"] for kind in volume} == {"name", "emptyDir"}
    assert all(volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"])


@every_build
def test_the_user_and_the_writable_folders_are_those_of_the_image(path: str) -> None:
    image = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    spec = pod(built(path))

    identity = spec["securityContext"]
    assert f"USER {identity['runAsUser']}:{identity['runAsGroup']}" in image
    assert identity["fsGroup"] == identity["runAsGroup"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container(built(path))["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in spec["volumes"]}
    assert f"ANYTIME_PROFILE_CACHE={mounts['cache']}" in image


@every_build
def test_every_container_has_limits_and_its_processors_are_whole_and_its_own(path: str) -> None:
    resources = container(built(path))["resources"]

    assert set(resources["limits"]) >= {"cpu", "memory"}
    assert resources["limits"]["cpu"].isdecimal()
    assert all(resources["limits"][name] == value for name, value in resources["requests"].items())


def test_a_replica_on_a_gpu_has_one_and_no_other_has() -> None:
    limits = {path: container(built(path))["resources"]["limits"].get("nvidia.com/gpu") for path in BUILDS}

    assert limits == {"base": None, "overlays/cpu": None, "overlays/gpu": "1"}
    assert settings(built("overlays/gpu"))["ANYTIME_PROVIDER"] == "cuda"


@every_build
def test_images_are_pinned_to_this_version(path: str) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version

    name, _, tag = container(built(path))["image"].rpartition(":")

    assert name.rpartition("/")[2] == "anytime-inference"
    assert tag == f"{version[1]}-{'gpu' if path.endswith('gpu') else 'cpu'}"


# ---- true to the server ----


@every_build
def test_every_setting_is_one_and_the_server_starts_with_them(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [*settings(built(path)), *(variable["name"] for variable in container(built(path))["env"])]
    assert {name.removeprefix(PREFIX).lower() for name in written} <= set(Settings.model_fields)

    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in settings(built(path)).items():
        monkeypatch.setenv(name, value)
    Settings(_env_file=None)


def test_the_variables_that_kubernetes_would_add_for_the_service_are_not_let_in() -> None:
    assert pod(built("base"))["enableServiceLinks"] is False


@every_build
def test_only_hashes_come_from_the_secret_and_it_may_be_missing(path: str) -> None:
    for variable in container(built(path))["env"]:
        assert variable["valueFrom"]["secretKeyRef"]["optional"] is True
        assert variable["name"] in {"ANYTIME_API_KEYS", "ANYTIME_ADMIN_KEYS"}


@every_build
def test_probes_ask_what_the_server_answers_without_a_key(path: str) -> None:
    one = container(built(path))
    ports = {port["name"] for port in one["ports"]}
    routes = set(re.findall(r'"(/healthz/\w+)"', (ROOT / "service" / "api.py").read_text(encoding="utf-8")))

    for kind, asked in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        get = one[f"{kind}Probe"]["httpGet"]
        assert get == {"path": f"/healthz/{asked}", "port": "http"}
        assert get["path"] in routes
        assert is_probe(get["path"])
        assert get["port"] in ports


@every_build
def test_ports_are_those_that_the_server_listens_on(path: str) -> None:
    fields = Settings.model_fields
    by_name = {port["name"]: port["containerPort"] for port in container(built(path))["ports"]}

    assert by_name == {"http": fields["port"].default, "grpc": fields["grpc_port"].default}


@every_build
def test_a_start_may_take_as_long_as_measuring_does(path: str) -> None:
    probe = container(built(path))["startupProbe"]

    assert (
        probe["periodSeconds"] * probe["failureThreshold"] >= Settings.model_fields["load_timeout_s"].default
    )


@every_build
def test_nobody_is_killed_while_it_drains_nor_before_the_nodes_know(path: str) -> None:
    chosen, spec = settings(built(path)), pod(built(path))
    drain_s = [float(chosen[f"ANYTIME_DRAIN_{name}_S"]) for name in ("NOTICE", "TIMEOUT", "LINGER")]
    readiness = container(built(path))["readinessProbe"]

    assert spec["terminationGracePeriodSeconds"] > sum(drain_s) + 5
    assert drain_s[0] > readiness["periodSeconds"] * readiness["failureThreshold"]
    assert "lifecycle" not in container(built(path))  # no sleep beside the setting that is there for it


# ---- consistent in itself ----


@every_build
def test_an_update_takes_no_replica_away_before_another_is_there(path: str) -> None:
    spec = the(built(path), "Deployment")["spec"]

    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert "replicas" not in spec  # it is the autoscaler's


@every_build
def test_selectors_find_the_pods_and_nothing_else(path: str) -> None:
    objects = built(path)
    deployment = the(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]

    for selector in selectors(objects):
        assert selector
        assert selector.items() <= labels.items()
    assert deployment["selector"]["matchLabels"] == labels


def selectors(objects: tuple[Object, ...]) -> Iterator[dict[str, str]]:
    """Everything by which these objects choose pods."""
    yield the(objects, "Deployment")["spec"]["selector"]["matchLabels"]
    yield the(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    yield the(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    for service in ("anytime", "anytime-grpc"):
        yield the(objects, "Service", service)["spec"]["selector"]
    for constraint in pod(objects)["topologySpreadConstraints"]:
        yield constraint["labelSelector"]["matchLabels"]


@every_build
def test_ports_are_called_by_names_that_the_container_gives(path: str) -> None:
    objects = built(path)
    names = {port["name"] for port in container(objects)["ports"]}

    for service in ("anytime", "anytime-grpc"):
        assert {port["targetPort"] for port in the(objects, "Service", service)["spec"]["ports"]} <= names
    for rule in the(objects, "NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= names


@every_build
def test_calls_over_grpc_are_not_all_led_to_one_replica(path: str) -> None:
    assert the(built(path), "Service", "anytime-grpc")["spec"]["clusterIP"] == "None"


@every_build
def test_only_some_may_call_and_the_server_calls_hardly_anybody(path: str) -> None:
    policy = the(built(path), "NetworkPolicy")["spec"]

    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule["from"] and rule["ports"] for rule in policy["ingress"])
    (prometheus,) = [rule for rule in policy["ingress"] if "monitoring" in str(rule["from"])]
    assert [port["port"] for port in prometheus["ports"]] == ["http"]
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 4317}


# ---- watched and scaled ----


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_service_is_scraped_once_and_under_the_name_that_the_rules_ask_for(name: str) -> None:
    objects = built(f"overlays/{name}")
    monitor = the(objects, "ServiceMonitor")["spec"]

    wanted = monitor["selector"]["matchLabels"].items()
    found = [
        one for one in objects if one["kind"] == "Service" and wanted <= one["metadata"]["labels"].items()
    ]

    (service,) = found
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "anytime"
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_rules_are_those_of_prometheus(name: str) -> None:
    assert prometheusrule.WRITTEN.read_text(encoding="utf-8") == prometheusrule.document(), "make manifests"

    groups = the(built(f"overlays/{name}"), "PrometheusRule")["spec"]["groups"]
    files = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    assert groups == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]


def adapter() -> dict[str, Object]:
    """What the adapter makes, by name."""
    values = yaml.safe_load((FOLDER / "components" / "hpa" / "adapter.yaml").read_text(encoding="utf-8"))
    return {rule["name"]["as"]: rule for rule in values["rules"]["custom"]}


def query_of(rule: Object) -> str:
    """A query of the adapter's as it asks it."""
    resources = rule["resources"]["overrides"]
    query: str = rule["metricsQuery"].replace("<<.GroupBy>>", ",".join(resources))
    (object_,) = set(resources) - {"namespace"}
    return query.replace("<<.LabelMatchers>>", f'namespace="anytime",{object_}="anytime"')


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_autoscaler_asks_for_what_the_adapter_makes_of_what_there_is(name: str) -> None:
    objects = built(f"overlays/{name}")
    made = adapter()
    asked = the(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]

    for metric in asked:
        detail = metric[metric["type"].lower()]
        resources = {
            mapped["resource"] for mapped in made[detail["metric"]["name"]]["resources"]["overrides"].values()
        }
        if metric["type"] == "Object":
            the(objects, detail["describedObject"]["kind"], detail["describedObject"]["name"])
            assert detail["describedObject"]["kind"].lower() in resources
        else:
            assert "pod" in resources
    assert {metric[metric["type"].lower()]["metric"]["name"] for metric in asked} == set(made)


def test_queries_of_autoscalers_ask_for_what_there_is(keda: dict[str, tuple[Object, ...]]) -> None:
    for rule in adapter().values():
        query = query_of(rule)
        queries.check(query.replace('pod="anytime"', 'instance="anytime"'), RECORDED)
        series = rule["seriesQuery"].partition("{")[0]
        assert series in query
    for objects in keda.values():
        for trigger in the(objects, "ScaledObject")["spec"]["triggers"]:
            queries.check(trigger["metadata"]["query"], RECORDED)


def test_both_autoscalers_want_the_same(keda: dict[str, tuple[Object, ...]]) -> None:
    for name in OVERLAYS:
        hpa = the(built(f"overlays/{name}"), "HorizontalPodAutoscaler")["spec"]
        scaled = the(keda[f"{name}-keda"], "ScaledObject")["spec"]

        targets = [quantity(metric[metric["type"].lower()]["target"]) for metric in hpa["metrics"]]
        assert targets == [float(trigger["metadata"]["threshold"]) for trigger in scaled["triggers"]]
        assert hpa["behavior"] == scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert (hpa["minReplicas"], hpa["maxReplicas"]) == (
            *(scaled["minReplicaCount"], scaled["maxReplicaCount"]),
        )
        assert hpa["scaleTargetRef"] == scaled["scaleTargetRef"]
        assert "ANYTIME_BATCH_SIZES" not in settings(built(f"overlays/{name}"))
        assert targets[0] == (GPU_BATCH_SIZES if name == "gpu" else CPU_BATCH_SIZES)[-1]


def quantity(target: Object) -> float:
    text = str(target.get("averageValue") or target["value"])
    return float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)


@pytest.mark.parametrize("name", OVERLAYS)
def test_there_are_two_replicas_at_least_so_that_one_can_go(name: str) -> None:
    objects = built(f"overlays/{name}")

    assert the(objects, "HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 2
    assert the(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


@pytest.mark.prometheus
@pytest.mark.skipif(promtool is None, reason="needs promtool (Debian: apt install prometheus)")
def test_autoscalers_get_a_number_when_nobody_calls_and_the_right_one_when_deadlines_are_missed(
    tmp_path: Path, keda: dict[str, tuple[Object, ...]]
) -> None:
    burn = [
        query_of(adapter()["anytime_error_budget_burn"]),
        the(keda["cpu-keda"], "ScaledObject")["spec"]["triggers"][1]["metadata"]["query"],
    ]
    target = 'namespace="anytime",job="anytime",instance="a"'

    def expecting(burns: float, **increases: int) -> Object:
        """Say what the queries give when so many requests a minute end in these ways."""
        outcomes = dict.fromkeys(("answered", "late", "expired", "failed", "stopped"), 0) | increases
        series = {f'anytime_requests_total{{outcome="{name}",{target}}}': n for name, n in outcomes.items()}
        series |= {f'anytime_rejections_total{{reason="{name}",{target}}}': 0 for name in ("load", "decode")}
        series[f"anytime_event_loop_cpu_seconds_total{{{target}}}"] = 15
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": f"0+{n}x40"} for name, n in series.items()],
            "promql_expr_test": [
                {
                    "expr": f"round({query}, 0.001)",
                    "eval_time": "35m",
                    "exp_samples": [{"labels": labels, "value": burns}],
                }
                for query, labels in zip(burn, ('{job="anytime", namespace="anytime"}', "{}"), strict=True)
            ],
        }

    case = {
        "rule_files": [
            str(path) for path in sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
        ],
        "evaluation_interval": "1m",
        # Nobody calls; and of 100 requests 5 are late, where 1 may be.
        "tests": [expecting(0), expecting(5, answered=95, late=5)],
    }
    (tmp_path / "case.yml").write_text(yaml.safe_dump(case), encoding="utf-8")
    assert promtool
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "case.yml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )

    assert done.returncode == 0, done.stdout + done.stderr
