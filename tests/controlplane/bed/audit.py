"""The API server's audit log as a record of who did what: used permissions, and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Everything but the bed's own machinery, whose heartbeats and loops would drown the rest.
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {
            "level": "None",
            "users": [
                "system:apiserver",
                "system:kube-controller-manager",
                "system:kube-scheduler",
                "system:kwok",
            ],
        },
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "None", "nonResourceURLs": ["/readyz*", "/livez*", "/healthz*"]},
        {"level": "Metadata"},
    ],
}


class Permission(NamedTuple):
    """What a rule of a Role allows or a request needs; `resource` includes a subresource (pods/status)."""

    group: str
    resource: str
    verb: str


@dataclass(frozen=True)
class AuditEvent:
    """One answered request to the API server."""

    user: str
    verb: str
    uri: str
    group: str
    resource: str
    namespace: str
    name: str
    code: int
    user_agent: str

    @property
    def permission(self) -> Permission | None:
        """The permission that the request needed; None for URLs such as /version."""
        return Permission(self.group, self.resource, self.verb) if self.resource else None


class AuditLog:
    """The audit log of a control plane, readable while it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def position(self) -> int:
        """Where the log ends now: pass it as `since` to see only what comes after."""
        return self.path.stat().st_size if self.path.exists() else 0

    def events(self, since: int = 0, user: str | None = None) -> Iterator[AuditEvent]:
        """The requests, in the order of their answers; of one user if named.

        A ServiceAccount's user name is ``system:serviceaccount:NAMESPACE:NAME``.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as log:
            log.seek(since)
            for line in log:
                if not line.endswith(b"\n"):
                    return  # still being written
                event = _event(json.loads(line))
                if user is None or event.user == user:
                    yield event

    def used(self, user: str, since: int = 0) -> set[Permission]:
        """The permissions that a user's granted requests needed."""
        return {
            event.permission
            for event in self.events(since, user)
            if event.permission is not None and event.code != 403
        }

    def denied(self, user: str | None = None, since: int = 0) -> list[AuditEvent]:
        """The requests that were refused with 403."""
        return [event for event in self.events(since, user) if event.code == 403]


def permissions(rules: Iterable[Mapping[str, Any]]) -> set[Permission]:
    """What the rules of a Role or ClusterRole allow, one by one.

    Raises:
        ValueError: a rule has a wildcard, which can't be counted.
    """
    allowed = set()
    for rule in rules:
        for group in rule.get("apiGroups", []):
            for resource in rule.get("resources", []):
                for verb in rule["verbs"]:
                    if "*" in (group, resource, verb):
                        raise ValueError(f"a wildcard in {rule}")
                    allowed.add(Permission(group, resource, verb))
    return allowed


def _event(raw: Mapping[str, Any]) -> AuditEvent:
    about = raw.get("objectRef", {})
    resource, subresource = about.get("resource", ""), about.get("subresource", "")
    return AuditEvent(
        user=raw["user"].get("username", ""),
        verb=raw["verb"],
        uri=raw["requestURI"],
        group=about.get("apiGroup", ""),
        resource=f"{resource}/{subresource}" if subresource else resource,
        namespace=about.get("namespace", ""),
        name=about.get("name", ""),
        code=raw.get("responseStatus", {}).get("code", 0),
        user_agent=raw.get("userAgent", ""),
    )
