"""A Kubernetes cluster as tests use it: kubectl, helm, objects. The test bed's own or any other."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tests.controlplane.bed.build import ensure, kubectl_path
from tests.controlplane.bed.process import wait_until

Manifest = Mapping[str, Any]


class CommandError(RuntimeError):
    """kubectl or helm failed.

    Attributes:
        code: the exit status.
        stdout: what it printed.
        stderr: what it said about the failure.
    """

    def __init__(self, command: str, code: int, stdout: str, stderr: str) -> None:
        super().__init__(f"{command}: exit status {code}\n{stderr.strip() or stdout.strip()}")
        self.code = code
        self.stdout = stdout
        self.stderr = stderr


class Cluster:
    """A cluster behind a kubeconfig.

    Args:
        kubeconfig: a file whose current context may do everything.
        work: a directory for caches and generated files.
    """

    def __init__(self, kubeconfig: Path, work: Path) -> None:
        self._admin = kubeconfig
        self._work = work
        self._kubectl = kubectl_path()

    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self._admin

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
        kubeconfig: Path | None = None,
        timeout: float = 60,
    ) -> str:
        """Run kubectl and return what it prints.

        Args:
            args: its arguments.
            input: its standard input.
            kubeconfig: whose credentials; by default the administrator's.
            timeout: seconds.

        Raises:
            CommandError: it failed.
        """
        command = [str(self._kubectl), f"--cache-dir={self._work / 'kubectl-cache'}", *args]
        return self._run(command, input=input, kubeconfig=kubeconfig, timeout=timeout)

    def helm(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
        kubeconfig: Path | None = None,
        timeout: float = 120,
    ) -> str:
        """Run helm, with a home of its own, and return what it prints.

        Raises:
            CommandError: it failed.
            BuildError: there is no helm.
        """
        home = self._work / "helm"
        env = {f"HELM_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        command = [str(ensure(["helm"])["helm"]), *args]
        return self._run(command, input=input, kubeconfig=kubeconfig, timeout=timeout, env=env)

    def apply(
        self, *manifests: Manifest | str, namespace: str | None = None, kubeconfig: Path | None = None
    ) -> str:
        """Apply objects server-side, each a mapping or YAML text, and return what kubectl says."""
        documents = [each if isinstance(each, str) else yaml.safe_dump(dict(each)) for each in manifests]
        scope = [f"--namespace={namespace}"] if namespace else []
        return self.kubectl(
            "apply",
            "--server-side",
            "--field-manager=test",
            *scope,
            "-f",
            "-",
            input="\n---\n".join(documents),
            kubeconfig=kubeconfig,
        )

    def get(self, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
        """One object.

        Raises:
            CommandError: it is not there.
        """
        scope = [f"--namespace={namespace}"] if namespace else []
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, name, *scope, "-o", "json"))
        return found

    def find(self, kind: str, name: str, namespace: str | None = None) -> dict[str, Any] | None:
        """One object, or nothing when it is not there."""
        scope = [f"--namespace={namespace}"] if namespace else []
        text = self.kubectl("get", kind, name, *scope, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, namespace: str | None = None, selector: str = "") -> list[dict[str, Any]]:
        """The objects of a kind: of one namespace, or of all."""
        scope = f"--namespace={namespace}" if namespace else "--all-namespaces"
        text = self.kubectl("get", kind, scope, f"--selector={selector}", "-o", "json")
        items: list[dict[str, Any]] = json.loads(text)["items"]
        return items

    def wait_for_crd(self, *names: str, timeout: float = 30) -> None:
        """Wait until custom resources can be used: established, and in the discovery answers."""
        crds = [f"crd/{name}" for name in names]
        self.kubectl("wait", "--for=condition=Established", f"--timeout={timeout:g}s", *crds)

        def discovered() -> bool:
            return set(names) <= set(self.kubectl("api-resources", "-o", "name", "--cached=false").split())

        wait_until(discovered, timeout=timeout, what=f"{', '.join(names)} in the discovery answers")

    def create_namespace(self, prefix: str = "test", labels: Mapping[str, str] | None = None) -> str:
        """Make a namespace with a fresh name, ready for pods (its default ServiceAccount exists)."""
        name = f"{prefix}-{secrets.token_hex(4)}"
        # The controller that makes the account looks again after half a minute when the API server was away.
        space = {"name": name, "labels": dict(labels or {})}
        account = {"name": "default", "namespace": name}
        self.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": space},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
        )
        return name

    def delete_namespace(self, name: str, timeout: float | None = None) -> None:
        """Delete a namespace with all in it.

        Args:
            name: the namespace.
            timeout: seconds to wait until it is gone; None doesn't wait.

        Raises:
            TimeoutError: it is still there; the message says what the namespace controller waits for,
                such as an object whose finalizer nobody takes away.
        """
        self.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
        if timeout is None:
            return
        try:
            wait_until(
                lambda: self.find("namespace", name) is None,
                timeout=timeout,
                what=f"namespace {name} gone",
                interval=0.2,
            )
        except TimeoutError as error:
            left = self.find("namespace", name) or {}
            reasons = [
                condition["message"]
                for condition in left.get("status", {}).get("conditions", [])
                if condition["status"] == "True"
            ]
            raise TimeoutError(f"{error}: {' '.join(reasons)}") from error

    def service_account_kubeconfig(self, namespace: str, name: str, duration: str = "24h") -> Path:
        """A kubeconfig with a token of a ServiceAccount, as a pod with it would have."""
        wait_until(
            lambda: self.find("serviceaccount", name, namespace) is not None,
            timeout=30,
            what=f"ServiceAccount {namespace}/{name}",
        )
        token = self.kubectl("create", "token", name, "-n", namespace, f"--duration={duration}").strip()
        path = self._work / f"{namespace}.{name}.{secrets.token_hex(4)}.kubeconfig"
        config = yaml.safe_load(self.kubectl("config", "view", "--raw", "--minify", "--flatten"))
        config["users"][0]["user"] = {"token": token}
        config["contexts"][0]["context"]["namespace"] = namespace
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config))
        return path

    def _run(
        self,
        command: Sequence[str],
        *,
        input: str | None,  # noqa: A002
        kubeconfig: Path | None,
        timeout: float,
        env: Mapping[str, str] | None = None,
    ) -> str:
        done = subprocess.run(
            command,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "KUBECONFIG": str(kubeconfig or self._admin), **(env or {})},
        )
        if done.returncode != 0:
            shown = " ".join([Path(command[0]).name, *command[1:]])
            raise CommandError(shown, done.returncode, done.stdout, done.stderr)
        return done.stdout
