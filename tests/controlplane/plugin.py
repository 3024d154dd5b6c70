"""pytest plugin of the test bed: options and fixtures. ``tests/conftest.py`` loads it for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.controlplane.bed import Cluster, ControlPlane, ensure, kuberay
from tests.controlplane.bed.build import PROGRAMS

_OWN = "control_plane"
_KUBERAY = "kuberay_operator"
_LOGS = Path("build", "controlplane-logs")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("control plane")
    group.addoption(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="run the tests that can on this cluster instead of a control plane of their own",
    )


def pytest_runtestloop(session: pytest.Session) -> None:
    """Build before the first test: a test's time-out is not meant to hold minutes of compilation."""
    if session.config.option.collectonly or session.testsfailed:
        return
    needed = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    programs = set()
    if _OWN in needed:
        programs |= set(PROGRAMS) - {kuberay.NAME}
    if _KUBERAY in needed:
        programs.add(kuberay.NAME)
    if programs:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        ensure(
            [name for name in PROGRAMS if name in programs],
            report=print if reporter is None else reporter.write_line,
        )


@pytest.fixture(scope="session")
def control_plane(request: pytest.FixtureRequest) -> Iterator[ControlPlane]:
    """A Kubernetes control plane of this test session's own, for tests that also break it."""
    if request.config.option.kubeconfig is not None:
        pytest.skip("needs a control plane of its own, and --kubeconfig names another cluster")
    with ControlPlane() as own:
        yield own
        if request.session.testsfailed:
            kept = own.keep_logs(request.config.rootpath / _LOGS)
            reporter = request.config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter.write_line(f"\nlogs of the control plane: {kept}")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A Kubernetes cluster: the one of --kubeconfig, else the test bed's control plane."""
    given: Path | None = request.config.option.kubeconfig
    if given is not None:
        return Cluster(given.expanduser().absolute(), tmp_path_factory.mktemp("cluster"))
    own: ControlPlane = request.getfixturevalue(_OWN)
    return own


@pytest.fixture(scope="session")
def kuberay_operator(control_plane: ControlPlane) -> ControlPlane:
    """The control plane with KubeRay's CRDs and its operator running: component ``kuberay-operator``."""
    kuberay.install(control_plane)
    return control_plane


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace; deleted afterwards without waiting."""
    name = cluster.create_namespace()
    yield name
    cluster.delete_namespace(name)
