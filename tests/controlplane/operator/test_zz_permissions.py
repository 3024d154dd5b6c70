"""The ServiceAccount has what the tests before this one needed, and nothing else. Runs last, by its name."""

from __future__ import annotations

import pytest
import yaml
from tests.controlplane.bed import ControlPlane, permissions
from tests.controlplane.bed.audit import Permission
from tests.controlplane.operator.conftest import MANIFESTS, OPERATOR, SYSTEM

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(60)]

USER = f"system:serviceaccount:{SYSTEM}:{OPERATOR}"
NOT_IN_THE_LOG = {
    # An apply that creates is logged as the patch that it is; the API server asks for both.
    Permission("ray.io", "rayclusters", "create"),
}


def test_nothing_was_denied(control_plane: ControlPlane) -> None:
    denied = {(e.verb, e.uri.partition("?")[0], e.code) for e in control_plane.audit.denied(USER)}
    # Events and statuses for a namespace that is just being deleted are refused by admission, not by RBAC.
    assert not {d for d in denied if "/namespaces/test-" not in d[1]}


def test_no_verb_is_unused(control_plane: ControlPlane, request: pytest.FixtureRequest) -> None:
    if len(request.session.items) < 40:
        pytest.skip("only after all tests of the operator, which use the permissions")
    granted = set()
    for name in ("clusterrole", "role"):
        granted |= permissions(yaml.safe_load((MANIFESTS / "rbac" / f"{name}.yaml").read_text())["rules"])
    unused = granted - control_plane.audit.used(USER) - NOT_IN_THE_LOG
    assert not unused
