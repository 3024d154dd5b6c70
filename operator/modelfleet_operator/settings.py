"""Settings of the operator process, from its environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

PREFIX: Final = "MODELFLEET_"
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off", ""})


class SettingsError(ValueError):
    """A variable has a value that can't be used."""


@dataclass(frozen=True)
class DefaultImages:
    """Images of Ray nodes where a ServingPool names none; ``{version}`` stands for the engine's version."""

    head: str = "ghcr.io/modelfleet/modelfleet-ray:latest"
    vllm: str = "ghcr.io/modelfleet/modelfleet-vllm:latest"
    sglang: str = "ghcr.io/modelfleet/modelfleet-sglang:latest"


@dataclass(frozen=True)
class Settings:
    """All settings, each from the environment variable that its comment names.

    Attributes:
        namespace: the operator's own; its pools serve all namespaces. ``MODELFLEET_NAMESPACE``.
        watch_namespaces: namespaces to work in; empty means all. With commas:
            ``MODELFLEET_WATCH_NAMESPACES``.
        listen: address of health checks and metrics. ``MODELFLEET_LISTEN``.
        leader_election: whether a second process may stand by. ``MODELFLEET_LEADER_ELECTION``.
        lease_name: name of the Lease. ``MODELFLEET_LEASE_NAME``.
        lease_seconds: after so long without a sign of life the standby takes over.
            ``MODELFLEET_LEASE_SECONDS``.
        identity: of this process in the Lease and in events. ``MODELFLEET_IDENTITY``.
        log_level: ``MODELFLEET_LOG_LEVEL``.
        let_go_seconds: a ModelDeployment that is being deleted is let go when its Ray cluster or registry has
            been away for so long. ``MODELFLEET_LET_GO_SECONDS``.
        drain_margin_seconds: added to a ModelDeployment's own drain timeout.
            ``MODELFLEET_DRAIN_MARGIN_SECONDS``.
        pending_seconds: a variant whose accelerator has not come after so long takes its next preference.
            ``MODELFLEET_PENDING_SECONDS``.
        resync_seconds: how often everything is listed anew. ``MODELFLEET_RESYNC_SECONDS``.
        images: ``MODELFLEET_IMAGE_HEAD``, ``MODELFLEET_IMAGE_VLLM``, ``MODELFLEET_IMAGE_SGLANG``.
    """

    namespace: str = "modelfleet-system"
    watch_namespaces: tuple[str, ...] = ()
    listen: tuple[str, int] = ("0.0.0.0", 8080)  # noqa: S104  a pod's port; loopback could not be probed
    leader_election: bool = True
    lease_name: str = "modelfleet-operator"
    lease_seconds: float = 15.0
    identity: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    log_level: str = "INFO"
    let_go_seconds: float = 30.0
    drain_margin_seconds: float = 90.0
    pending_seconds: float = 900.0
    resync_seconds: float = 300.0
    images: DefaultImages = DefaultImages()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Settings of a process.

        Raises:
            SettingsError: a value can't be used; the message names the variable.
        """
        default = cls()
        value = _Reader(environment)
        images = DefaultImages()
        return cls(
            namespace=value.text("NAMESPACE", default.namespace),
            watch_namespaces=tuple(
                n.strip() for n in value.text("WATCH_NAMESPACES", "").split(",") if n.strip()
            ),
            listen=value.address("LISTEN", default.listen),
            leader_election=value.switch("LEADER_ELECTION", default.leader_election),
            lease_name=value.text("LEASE_NAME", default.lease_name),
            lease_seconds=value.seconds("LEASE_SECONDS", default.lease_seconds, least=3),
            identity=value.text("IDENTITY", default.identity),
            log_level=value.text("LOG_LEVEL", default.log_level).upper(),
            let_go_seconds=value.seconds("LET_GO_SECONDS", default.let_go_seconds),
            drain_margin_seconds=value.seconds("DRAIN_MARGIN_SECONDS", default.drain_margin_seconds),
            pending_seconds=value.seconds("PENDING_SECONDS", default.pending_seconds),
            resync_seconds=value.seconds("RESYNC_SECONDS", default.resync_seconds),
            images=DefaultImages(
                head=value.text("IMAGE_HEAD", images.head),
                vllm=value.text("IMAGE_VLLM", images.vllm),
                sglang=value.text("IMAGE_SGLANG", images.sglang),
            ),
        )


@dataclass(frozen=True)
class _Reader:
    environment: Mapping[str, str]

    def text(self, name: str, default: str) -> str:
        return self.environment.get(PREFIX + name) or default

    def switch(self, name: str, default: bool) -> bool:
        value = self.environment.get(PREFIX + name)
        if value is None:
            return default
        if value.lower() not in _TRUE | _FALSE:
            raise SettingsError(f"{PREFIX}{name}: {value!r} is neither true nor false")
        return value.lower() in _TRUE

    def seconds(self, name: str, default: float, least: float = 0.1) -> float:
        value = self.environment.get(PREFIX + name)
        if not value:
            return default
        try:
            number = float(value)
        except ValueError:
            raise SettingsError(f"{PREFIX}{name}: {value!r} is no number of seconds") from None
        if number < least:
            raise SettingsError(f"{PREFIX}{name}: {value} is less than {least:g} seconds")
        return number

    def address(self, name: str, default: tuple[str, int]) -> tuple[str, int]:
        value = self.environment.get(PREFIX + name)
        if not value:
            return default
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise SettingsError(f"{PREFIX}{name}: {value!r} is not HOST:PORT")
        return host.strip("[]"), int(port)
