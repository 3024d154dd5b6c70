"""What can go wrong with an engine's environment. Every message says what to do next."""

from __future__ import annotations

from pathlib import Path


class EnvironmentsError(Exception):
    """Base of the errors of this package; the text is meant for the user."""


class UnknownEngineError(EnvironmentsError):
    """No engine of that name has environments."""

    def __init__(self, engine: str, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown engine {engine!r}; known: {', '.join(known)}")


class UnsupportedPlatformError(EnvironmentsError):
    """The engine can't run on this machine."""


class EngineNotInstalledError(EnvironmentsError):
    """No usable environment; ``command`` makes one."""

    def __init__(self, engine: str, version: str | None, reason: str | None = None) -> None:
        self.command = f"modelfleet engine install {engine}" + (f" --version {version}" if version else "")
        what = reason or f"no environment with {engine}{' ' + version if version else ''} on this machine"
        super().__init__(f"{what}; make one: {self.command}")


class InstallError(EnvironmentsError):
    """An install step failed; ``log`` holds everything the installer said."""

    def __init__(self, step: str, hint: str | None, tail: list[str], log: Path) -> None:
        self.log = log
        lines = [f"{step} failed" + (f": {hint}" if hint else "")]
        lines += [f"  {line}" for line in tail]
        lines.append(f"full log: {log}")
        super().__init__("\n".join(lines))
