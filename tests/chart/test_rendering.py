"""What the chart renders to, with the API server as judge where it has a say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY, generate_latest
from tests.chart.rendered import CHART, INSTALL, SYSTEM, Object, install_files, only, template
from tests.controlplane.bed import ControlPlane

from modelfleet_operator import metrics as operator_metrics
from modelfleet_operator.settings import Settings as OperatorSettings
from modelfleet_serving.registry.metrics import RegistryMetrics
from modelfleet_serving.registry.state import Registry
from modelfleet_serving.router.metrics import render as render_router
from modelfleet_serving.router.observe import Snapshot, VariantStats
from modelfleet_serving.router.settings import Settings as RouterSettings
from modelfleet_serving.router.settings import parse_settings

VALUES = [None, *sorted((Path(__file__).parent / "values").glob("*.yaml"))]
# Their CRDs are other projects'; what stands in ours of them is tested below.
FOREIGN = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "HTTPRoute"}


def _name(values: Path | None) -> str:
    return values.stem if values else "default"


@pytest.fixture(params=VALUES, ids=_name)
def values(request: pytest.FixtureRequest) -> list[str]:
    """Helm's options for one of the values files."""
    return ["-f", str(request.param)] if request.param else []


@pytest.fixture
def objects(values: list[str]) -> list[Object]:
    return template(*values)


@pytest.fixture(scope="module")
def crds(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    control_plane.kubectl("apply", "--server-side", "-f", str(CHART / "crds"))
    control_plane.wait_for_crd("modeldeployments.modelfleet.io", "servingpools.modelfleet.io")
    yield control_plane
    control_plane.kubectl("delete", "-f", str(CHART / "crds"))


def test_lint_is_clean(control_plane: ControlPlane, values: list[str]) -> None:
    report = control_plane.helm("lint", str(CHART), "--strict", *values)
    assert not re.findall(r"\[(?:WARNING|ERROR)\].*", report)


@pytest.mark.controlplane
def test_the_api_server_takes_it(crds: ControlPlane, system: str, objects: list[Object]) -> None:
    known = [yaml.safe_dump(o) for o in objects if o["kind"] not in FOREIGN]
    arguments = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"]
    crds.kubectl(*arguments, input="\n---\n".join(known))


def test_selectors_find_the_pods_they_mean(objects: list[Object]) -> None:
    pods = {o["metadata"]["name"]: o["spec"]["template"] for o in objects if o["kind"] == "Deployment"}
    for each in objects:
        if each["kind"] in ("Service", "PodDisruptionBudget", "PodMonitor", "ServiceMonitor"):
            selector = each["spec"]["selector"]
            labels = selector.get("matchLabels", selector)
            if "modelfleet.io/pool" in labels:
                continue  # Ray's pods
            found = [n for n, t in pods.items() if labels.items() <= t["metadata"]["labels"].items()]
            assert found == [each["metadata"]["name"]], each["kind"]
            ports = {p["name"] for p in pods[found[0]]["spec"]["containers"][0]["ports"]}
            wanted = each["spec"].get("ports") or each["spec"].get("podMetricsEndpoints") or []
            assert {p.get("targetPort", p.get("port")) for p in wanted} <= ports
    for name, pod in pods.items():
        deployment = only(objects, "Deployment", name)
        assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_pods_are_restricted(objects: list[Object]) -> None:
    for each in objects:
        if each["kind"] not in ("Deployment", "Job", "Pod"):
            continue
        pod = each["spec"] if each["kind"] == "Pod" else each["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        if each["kind"] == "Deployment":
            mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
            assert mounts["tmp"] == "/tmp"
            probes = {"startupProbe", "livenessProbe", "readinessProbe"}
            assert probes <= pod["containers"][0].keys()


def test_no_role_has_a_wildcard_or_binds_cluster_admin(objects: list[Object]) -> None:
    for each in objects:
        for rule in each.get("rules") or []:
            assert "*" not in json.dumps(rule), each["metadata"]["name"]
        assert each.get("roleRef", {}).get("name") != "cluster-admin"


def test_every_object_has_the_common_labels(objects: list[Object]) -> None:
    wanted = {f"app.kubernetes.io/{n}" for n in ("name", "instance", "component", "part-of", "version")}
    for each in objects:
        assert wanted | {"helm.sh/chart"} <= each["metadata"]["labels"].keys(), each["kind"]


def test_programs_understand_their_environment(objects: list[Object]) -> None:
    """Each variable is one that the program reads, with a value that it takes."""
    for each in objects:
        if each["kind"] != "Deployment":
            continue
        container = each["spec"]["template"]["spec"]["containers"][0]
        environment = {v["name"]: v.get("value", "from-elsewhere") for v in container["env"]}
        ours = {n: v for n, v in environment.items() if n.startswith("MODELFLEET_")}
        if container["name"] == "operator":
            settings = OperatorSettings.from_environment(ours)
            documented = OperatorSettings.__doc__ or ""
            assert settings.listen == ("0.0.0.0", 8080)
            for name in ours:
                assert f"``{name}``" in documented
        else:
            router = parse_settings([], ours)
            fields = {f"MODELFLEET_ROUTER_{f.upper()}" for f in RouterSettings.__struct_fields__}
            assert ours.keys() <= fields
            grace = each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
            assert grace >= router.drain_timeout + router.drain_delay + 10, "streams would be cut off"


def test_settings_of_the_router_arrive_as_written() -> None:
    objects = template("-f", str(Path(__file__).parent / "values" / "standby.yaml"))
    container = only(objects, "Deployment", "modelfleet-router")["spec"]["template"]["spec"]["containers"][0]
    settings = parse_settings([], {v["name"]: v.get("value", "x") for v in container["env"]})
    assert (settings.max_body_bytes, settings.max_attempts) == (134217728, 5)
    assert (settings.continue_streams, settings.idle_timeout, settings.cors_origins) == (False, 1200.5, "*")
    assert settings.registry == f"http://default-head-svc.{SYSTEM}.svc:8267"
    assert settings.token_file.endswith("/auth_token")
    assert settings.workers == 4


def test_a_pool_by_address_gives_the_routers_its_registry_and_token() -> None:
    objects = template("-f", str(Path(__file__).parent / "values" / "address.yaml"))
    pod = only(objects, "Deployment", "fleet-router")["spec"]["template"]["spec"]
    environment = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    assert environment["MODELFLEET_ROUTER_REGISTRY"] == "http://ray-head.ray.svc:8267"
    assert environment["MODELFLEET_ROUTER_TOKEN_FILE"] == "/var/run/modelfleet/token/token"
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert secrets == {"token": "ray-token", "tenants": "keys"}
    assert only(objects, "ServingPool", "existing")["spec"]["ray"].keys() == {"address", "authToken"}
    bindings = [o for o in objects if o["kind"] == "RoleBinding"]
    assert {b["metadata"]["namespace"] for b in bindings} == {SYSTEM, "default"}
    assert not [
        o for o in objects if o["kind"] == "ClusterRoleBinding" and "operator" in o["metadata"]["name"]
    ]


def test_a_digest_takes_the_place_of_the_tag() -> None:
    objects = template("-f", str(Path(__file__).parent / "values" / "operator-only.yaml"))
    assert {o["kind"] for o in objects} == {"Deployment"}
    image = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert re.fullmatch(r"modelfleet@sha256:[0-9a-f]{64}", image)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("router.wokers=4", "additional properties 'wokers' not allowed"),
        ("router.settings.max-body=1", "max-body"),
        ("image.pullPolicy=Sometimes", "value must be one of"),
        ("image.digest=latest", "does not match pattern"),
        ("operator.leaderElection.leaseSeconds=1", "minimum"),
        ("pool.accelerators[0].gpus=4", "additional properties 'gpus' not allowed"),
        ("pool.ray.cluster.version=2", "got number, want string"),
        ("pool.name=Default", "does not match pattern"),
        (
            "operator.replicas=2,operator.leaderElection.enabled=false",
            "needs operator.leaderElection",
        ),
        ("pool.create=false", "router.registry is needed"),
        ("pool.ray.address=http://ray:8265,pool.ray.cluster.version=2.60.0", "either pool.ray.address or"),
        ("operator.watchNamespaces={a}", "operator.watchNamespaces must hold modelfleet-system"),
        (
            "monitoring.podMonitor.enabled=true,monitoring.serviceMonitor.enabled=true",
            "both would count",
        ),
        ("router.httpRoute.enabled=true", "names no Gateway"),
        ("router.ingress.enabled=true", "names no host"),
    ],
)
def test_mistakes_are_refused_with_a_reason(option: str, why: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        template("--set", option)
    assert why in refusal.value.stderr


def test_every_value_is_described() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def undescribed(part: dict[str, Any], path: str) -> Iterator[str]:
        for name, below in part.get("properties", {}).items():
            if "description" not in below and "properties" not in below:
                yield f"{path}.{name}"
            yield from undescribed(below, f"{path}.{name}")

    assert list(undescribed(schema, "")) == []


def test_manifests_without_helm_are_what_the_chart_renders() -> None:
    stale = [path.name for path, text in install_files().items() if path.read_text() != text]
    assert not stale, "run `make generate-install`"
    assert {p.name for p in INSTALL.glob("*.yaml")} == {p.name for p in install_files()} | {"namespace.yaml"}


def _exported() -> set[str]:
    """Names of the series that our programs export."""
    stats = VariantStats(model="m", variant="v", statuses={200: 1})
    texts = [
        generate_latest(REGISTRY),
        render_router(Snapshot(variants=[stats]), [("m", "v", 1)], workers=1),
        RegistryMetrics(Registry("e", 0.0), lambda: 0.0, lambda: 0).exposition()[0],
    ]
    names = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", b"\n".join(texts).decode(), re.MULTILINE):
        names |= {
            name + suffix for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
        }
    return names


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    text = (CHART / "files" / "alerts.yaml").read_text() + (CHART / "files" / "dashboard.json").read_text()
    asked = set(re.findall(r"\bmodelfleet_(?:router|operator|registry)_[a-z_]+", text))
    assert len(asked) > 15
    assert asked - _exported() == set()
    assert operator_metrics.LEADER is not None  # its import is what registers the operator's


def test_dashboard_is_what_the_config_map_holds() -> None:
    objects = template("--set", "monitoring.dashboard.enabled=true")
    found = only(objects, "ConfigMap")
    dashboard = json.loads(found["data"]["modelfleet.json"])
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in dashboard["panels"]})
