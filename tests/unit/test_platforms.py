"""What is shipped for containers and clusters: compose file, manifests, scaling on lag."""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.declared import declared_settings
from config.settings import load_tunables
from tests.unit.test_deploy import instructions, procfile
from worker.telemetry import METRICS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes/tailrace.yaml").read_text()))
SCALED = yaml.safe_load((DEPLOY / "kubernetes/keda.yaml").read_text())
KNOWN = {setting.name for setting in declared_settings()}
PATIENCE = 10


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in MANIFESTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for one in MANIFESTS:
        if one["kind"] in ("Deployment", "Job"):
            yield one["metadata"]["name"], one["spec"]["template"]


def container(name: str) -> dict[str, Any]:
    (found,) = manifest("Deployment", name)["spec"]["template"]["spec"]["containers"]
    return found


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


@pytest.mark.parametrize("one", MANIFESTS, ids=lambda one: f"{one['kind']} {one['metadata']['name']}")
def test_a_manifest_fits_the_schema_of_kubernetes(one: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="of the extra `dev`")
    kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_refuses_what_is_wrong() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="of the extra `dev`")
    wrong = {**MANIFESTS[-1], "spec": {"maxUnavailabel": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def others_schema(name: str) -> Path:
    """A schema of somebody else, which is theirs to publish: no package has it, and it is not copied here."""
    path = Path(os.environ.get("TAILRACE_SCHEMAS", os.devnull)) / name
    if not path.is_file():
        pytest.skip(f"no {name} in the folder that TAILRACE_SCHEMAS names; CONTRIBUTING says whence")
    return path


def strict(schema: Any) -> Any:
    """A cluster forgets fields that the schema does not name: refuse them."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def test_the_compose_file_fits_the_schema_of_compose() -> None:
    jsonschema = pytest.importorskip(
        "jsonschema", reason="comes with kubernetes-validate, of the extra `dev`"
    )
    validator = jsonschema.Draft7Validator(json.loads(others_schema("compose-spec.json").read_text()))
    validator.validate(COMPOSE)
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["worker"]["stop_grace_periode"] = "35s"
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)


def test_the_scaling_fits_the_schema_of_keda() -> None:
    jsonschema = pytest.importorskip(
        "jsonschema", reason="comes with kubernetes-validate, of the extra `dev`"
    )
    definition = yaml.safe_load(others_schema("keda.sh_scaledobjects.yaml").read_text())
    kind, version = definition["spec"]["names"]["kind"], SCALED["apiVersion"].rpartition("/")[2]
    assert kind == SCALED["kind"]
    (found,) = [one for one in definition["spec"]["versions"] if one["name"] == version]
    schema = strict(found["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the other test knows
    jsonschema.validate(SCALED, schema)
    wrong = copy.deepcopy(SCALED)
    wrong["spec"]["fallback"]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=[name for name, _ in pods()])
def test_a_pod_has_no_privileges_and_writes_nothing(name: str, pod: dict[str, Any]) -> None:
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    user = f"{pod['spec']['securityContext']['runAsUser']}:{pod['spec']['securityContext']['runAsGroup']}"
    assert ("USER", user) in instructions()
    (only,) = pod["spec"]["containers"]
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert only["envFrom"] == [{"secretRef": {"name": "tailrace"}}]
    assert {one["name"] for one in only.get("env", [])} <= KNOWN
    assert only["resources"]["requests"].keys() == {"cpu", "memory"}
    # A limit of the processor would only make what must be quick slow.
    assert only["resources"]["limits"].keys() == {"memory"}


def test_a_manifest_runs_what_the_procfile_runs() -> None:
    (migrate,) = manifest("Job", "tailrace-migrate")["spec"]["template"]["spec"]["containers"]
    assert " ".join(migrate["command"]) == procfile()["release"]
    for process in ("listener", "worker"):
        assert " ".join(container(f"tailrace-{process}")["command"]) == procfile()[process]


@pytest.mark.parametrize(
    ("name", "port", "ready"),
    [
        ("tailrace-listener", "PORT", "/readyz?standby=ok"),
        ("tailrace-worker", "WORKER_HEALTH_PORT", "/readyz"),
    ],
)
def test_probes_ask_what_they_are_for_where_it_is_answered(name: str, port: str, ready: str) -> None:
    one = container(name)
    asked = {probe: one[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe")}
    assert asked == {"startupProbe": "/livez", "livenessProbe": "/livez"}
    assert one["readinessProbe"]["httpGet"]["path"] == ready
    environment = {pair["name"]: pair["value"] for pair in one["env"]}
    assert one["ports"] == [{"name": "http", "containerPort": int(environment[port])}]
    assert environment["HEALTH_HOST"] == "0.0.0.0"  # noqa: S104 - inside of a pod
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert one[probe]["httpGet"]["port"] == "http"
        # Health answers within five seconds, whatever is broken: a reason is better than a time-out.
        assert one[probe]["timeoutSeconds"] > 5


def test_processes_are_replaced_without_a_moment_with_none() -> None:
    for name in ("tailrace-listener", "tailrace-worker"):
        spec = manifest("Deployment", name)["spec"]
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        drain = load_tunables(None).drain_seconds
        assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= drain + PATIENCE
        labels = spec["template"]["metadata"]["labels"]
        selector = spec["selector"]["matchLabels"]
        assert selector.items() <= labels.items()
        budget = manifest("PodDisruptionBudget", name)["spec"]
        assert budget["selector"]["matchLabels"] == selector
    listeners = manifest("Deployment", "tailrace-listener")["spec"]["replicas"]
    assert manifest("PodDisruptionBudget", "tailrace-listener")["spec"]["minAvailable"] == listeners - 1 == 1
    # With a least number that must stay, a single worker could never be moved.
    assert manifest("PodDisruptionBudget", "tailrace-worker")["spec"].keys() == {"maxUnavailable", "selector"}


def test_workers_are_scaled_on_lag_that_is_told() -> None:
    spec = SCALED["spec"]
    assert (SCALED["apiVersion"], SCALED["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    assert spec.keys() <= {
        "scaleTargetRef",
        "pollingInterval",
        "cooldownPeriod",
        "minReplicaCount",
        "maxReplicaCount",
        "fallback",
        "advanced",
        "triggers",
    }
    target = spec["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"]) == ("apps/v1", "Deployment")
    worker = manifest("Deployment", target["name"])
    # A number here would undo with each release what the lag has asked for.
    assert "replicas" not in worker["spec"]
    # Retries are due without lag, too.
    assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"] <= load_tunables(None).lanes
    assert spec["fallback"].keys() == {"failureThreshold", "replicas"}
    assert spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
    assert spec["advanced"].keys() == {"horizontalPodAutoscalerConfig"}
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] > 60
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "prometheus"
    # Of any other type KEDA's fallback does nothing.
    assert trigger["metricType"] == "AverageValue"
    assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold", "activationThreshold"}
    # KEDA takes texts alone there.
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    named = set(re.findall(r"tailrace_\w+", trigger["metadata"]["query"]))
    assert named
    assert named <= METRICS.keys()


def test_services_of_the_compose_file_run_what_is_built_with_settings_that_exist() -> None:
    services = COMPOSE["services"]
    assert services.keys() == {"redis", "migrate", "listener", "worker"}
    stages = {rest.split()[-1] for instruction, rest in instructions() if instruction == "FROM"}
    for name in ("migrate", "listener", "worker"):
        one = services[name]
        build = one["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).exists()
        assert build["target"] in stages
        assert one["environment"].keys() <= KNOWN
        assert one["env_file"] == "tailrace.env"
        assert seconds(one["stop_grace_period"]) >= load_tunables(None).drain_seconds + PATIENCE
        assert services["redis"]["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]
        assert one["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert " ".join(services["migrate"]["command"]) == procfile()["release"]
    for name in ("listener", "worker"):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert services[name]["deploy"] == {"replicas": 2}
    assert services["listener"]["ports"] == ["127.0.0.1::8080"]
    assert services["listener"]["environment"]["WORKER_DASHBOARD"] == "everywhere"
    assert [name for name, one in services.items() if "ports" in one] == ["listener"]


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_a_service_has_no_privileges_and_writes_nothing(name: str) -> None:
    one = COMPOSE["services"][name]
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["mem_limit"]


def test_redis_of_the_compose_file_keeps_what_lies_in_it() -> None:
    command = COMPOSE["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    limit = int(options["--maxmemory"].removesuffix("mb")) * 1024 * 1024
    assert limit >= 2 * load_tunables(None).max_backlog_bytes
