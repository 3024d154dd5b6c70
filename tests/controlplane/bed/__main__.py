"""The test bed outside pytest: ``python -m tests.controlplane.bed {build,up}``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from tests.controlplane.bed import kuberay
from tests.controlplane.bed.build import PROGRAMS, BuildError, ensure
from tests.controlplane.bed.control_plane import ControlPlane
from tests.controlplane.bed.process import ComponentError


def main() -> int:
    """Build the programs, or start a control plane that stays until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.controlplane.bed", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build what is missing and print where it is")
    up = commands.add_parser("up", help="start a control plane, print its kubeconfig, stay until Ctrl-C")
    up.add_argument("--kubeconfig", type=Path, help="also write the kubeconfig to this file, when all is up")
    up.add_argument("--no-kuberay", action="store_true", help="leave KubeRay out")
    arguments = parser.parse_args()
    try:
        if arguments.command == "build":
            for name, path in ensure(PROGRAMS).items():
                print(f"{name}\t{path}")
            return 0
        return _up(arguments.kubeconfig, with_kuberay=not arguments.no_kuberay)
    except (BuildError, ComponentError) as error:
        print(error, file=sys.stderr)
        return 1


def _up(target: Path | None, *, with_kuberay: bool) -> int:
    over = threading.Event()

    def finish(_signal: int, _frame: FrameType | None) -> None:
        over.set()

    ensure(PROGRAMS if with_kuberay else set(PROGRAMS) - {kuberay.NAME})
    with ControlPlane() as control_plane:
        if with_kuberay:
            kuberay.install(control_plane)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, finish)
        kubeconfig = control_plane.kubeconfig()
        if target is not None:
            _publish(kubeconfig, target)
            kubeconfig = target.resolve()
        print(f"control plane up after {control_plane.startup_seconds['total']:.1f} s: {control_plane.url}")
        print(f"logs: {control_plane.layout.logs}")
        print(f"export KUBECONFIG={kubeconfig}", flush=True)
        over.wait()
        print("stopping", flush=True)
    if target is not None:
        target.unlink(missing_ok=True)
    return 0


def _publish(kubeconfig: Path, target: Path) -> None:
    # Whole or not at all: whoever waits for the file may use it at once.
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.touch(mode=0o600)
    partial.write_text(kubeconfig.read_text())
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
