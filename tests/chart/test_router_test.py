"""What the pod of `helm test` does, against a real router. In the test bed no pod runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.chart.rendered import only, template
from tests.controlplane.bed import wait_until
from tests.controlplane.operator.processes import Process

from modelfleet_serving.router.tenants import hash_key

KEY = "mf-test"


class Router(Process):
    def __init__(self, directory: Path, *options: str) -> None:
        self.port_file = directory / "port"
        self.routes = directory / "routes.yaml"
        variants = [{"name": "awq", "endpoints": [{"id": "r", "url": "http://127.0.0.1:9"}]}]
        self.routes.write_text(yaml.safe_dump({"models": [{"name": "m", "variants": variants}]}))
        command = [sys.executable, "-m", "modelfleet_serving.router", "--listen", "127.0.0.1:0"]
        command += ["--port-file", str(self.port_file), "--routes", str(self.routes), *options]
        super().__init__("router", command, directory / "router.log", {})

    def address(self) -> str:
        wait_until(self.port_file.exists, timeout=20, what="the router's port")
        return self.port_file.read_text().strip()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    with Router(tmp_path) as router:
        yield router


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Router]:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [{"name": "team", "hash": hash_key(KEY)}]}))
    with Router(tmp_path, "--tenants", str(keys)) as router:
        yield router


def helm_test(router: str, **environment: str) -> tuple[int, str]:
    """Run the pod's command."""
    pod = only(template(), "Pod", "modelfleet-test-router")
    command = pod["spec"]["containers"][0]["command"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert command[:2] == ["python", "-c"]
    env = {**os.environ, "ROUTER": f"http://{router}", "WAIT_SECONDS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command[1:]], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_names_the_models(router: Router) -> None:
    assert helm_test(router.address()) == (0, "ready; models: m, m:awq\n")


def test_tells_that_nobody_answers(router: Router) -> None:
    address = router.address()
    router.stop()
    code, said = helm_test(address)
    assert code == 1
    assert "is not ready: 0" in said


def test_asks_with_a_key(guarded: Router) -> None:
    address = guarded.address()
    assert helm_test(address, API_KEY=KEY) == (0, "ready; models: m, m:awq\n")
    assert helm_test(address)[0] == 0, "a router that asks for keys is no broken router"
    assert helm_test(address, API_KEY="wrong")[0] == 1


def test_asks_the_service_of_its_release() -> None:
    objects = template(
        "--set", "router.service.port=8443,router.tls.secret=t,test.apiKeySecret=k", release="x"
    )
    container = only(objects, "Pod")["spec"]["containers"][0]
    service = only(objects, "Service")["metadata"]
    environment = {v["name"]: v for v in container["env"]}
    address = f"https://{service['name']}.{service['namespace']}.svc:8443"
    assert environment["ROUTER"]["value"] == address
    assert environment["API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "k", "key": "key"}
