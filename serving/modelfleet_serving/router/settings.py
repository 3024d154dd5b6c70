"""Settings of the router, one source for the command line, the environment and the worker processes."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

ENV_PREFIX: Final = "MODELFLEET_ROUTER_"
MEBIBYTE: Final = 1024 * 1024


class SettingsError(ValueError):
    """A setting is missing, malformed or contradicts another one."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a router is told at its start. Times in seconds, sizes in bytes."""

    listen: str = "127.0.0.1:8080"
    """``HOST:PORT``; ``[::1]:8080`` for IPv6; port 0 takes a free one."""
    routes: str = ""
    """Route table file (JSON or YAML), reread when it changes."""
    registry: str = ""
    """Base URL of the registry; takes the place of ``routes``."""
    token_file: str = ""
    """File with the registry's bearer token, reread for every call."""
    router_id: str = ""
    """Name towards the registry; default: host name and process."""
    workers: int = 1
    port_file: str = ""
    """Where the bound ``HOST:PORT`` is written once the router accepts connections."""
    tls_certificate: str = ""
    tls_key: str = ""
    engine_ca: str = ""
    """File with the CA certificates of ``https`` engines; empty for the system's."""
    backlog: int = 4096
    max_connections: int = 20_000
    """Client connections of one worker; further ones wait in the kernel's backlog."""
    max_body_bytes: int = 64 * MEBIBYTE
    max_buffered_bytes: int = 1024 * MEBIBYTE
    """Request bodies that one worker holds in memory before it answers 503."""
    max_header_bytes: int = 64 * 1024
    header_timeout: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_timeout: float = 30.0
    """Grace for a body; after it the client must have sent 1 KiB a second on average."""
    keepalive_timeout: float = 75.0
    """Longest idle time of a client's connection."""
    write_timeout: float = 300.0
    """Longest time that a client may read nothing while an answer waits for it."""
    connect_timeout: float = 5.0
    first_byte_timeout: float = 600.0
    """From the sent request to the first byte of the engine's answer; a long prefill is not an error."""
    idle_timeout: float = 600.0
    """Longest silence of an engine in the middle of an answer."""
    max_attempts: int = 3
    """Engines that one request is tried on, before its first byte."""
    pool_idle: int = 256
    """Idle connections kept to one engine."""
    pool_idle_timeout: float = 4.0
    """Below uvicorn's keep-alive of 5 s, so that the engine rarely closes first."""
    drain_timeout: float = 600.0
    """From SIGTERM to the end of the last running request."""
    drain_delay: float = 0.0
    """From SIGTERM to the closed listener, with readiness failing: time for load balancers to notice."""
    tenants: str = ""
    """API keys: a YAML file or a directory of them (a mounted Secret), reread when it changes."""
    cors_origins: str = ""
    """Comma-separated origins that browsers may call from, or ``*``; empty sends no CORS headers."""
    access_log: str = ""
    """File for the JSON access log; ``-`` for standard output; empty for none."""
    continue_streams: bool = True
    """Let another replica go on with a stream whose replica died, where that is safe."""
    health_interval: float = 5.0
    """Time between active health checks of an engine; 0 for none."""
    health_path: str = "/health"
    otlp_endpoint: str = ""
    """OpenTelemetry collector (OTLP over HTTP); needs the opentelemetry packages."""
    log_level: str = "info"


# What would make every request fail, or the router busy with nothing. Others may be 0: off, or at once.
_LEAST: Final[Mapping[str, float]] = {
    "backlog": 1,
    "max_connections": 1,
    "max_header_bytes": 256,
    "header_timeout": 0.001,
    "body_timeout": 0.001,
    "connect_timeout": 0.001,
    "first_byte_timeout": 0.001,
    "idle_timeout": 0.001,
    "write_timeout": 0.001,
    "max_attempts": 1,
}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(name: str) -> str:
    return HELP.get(name, name.replace("_", " "))


HELP: Final[Mapping[str, str]] = {
    "listen": "HOST:PORT to serve on",
    "routes": "route table file (JSON or YAML), reread when it changes",
    "registry": "base URL of the registry, instead of --routes",
    "token_file": "file with the registry's bearer token",
    "workers": "worker processes on the same port",
    "tls_certificate": "certificate chain (PEM) of the listener, reread when it changes; with --tls-key",
    "tls_key": "private key (PEM) of --tls-certificate",
    "engine_ca": "CA certificates (PEM) that https engines are verified with (default: the system's)",
    "tenants": "API keys and limits: a YAML file or a directory of them",
    "port_file": "file that gets the bound HOST:PORT once connections are accepted",
    "access_log": "file of the JSON access log, - for standard output",
}


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the command line, then ``MODELFLEET_ROUTER_<NAME>``, then the defaults.

    Raises:
        SettingsError: with the name of the setting and what is allowed.
    """
    parser = argparse.ArgumentParser(
        prog="modelfleet router",
        description="OpenAI-compatible router in front of inference engines.",
        epilog=f"Every option is also read from the environment, as {ENV_PREFIX}<NAME>.",
    )
    defaults = Settings()
    for name in Settings.__struct_fields__:
        default = getattr(defaults, name)
        help_text = f"{_help(name)} (default: {default})" if default != "" else _help(name)
        if isinstance(default, bool):
            parser.add_argument(
                _option(name), action=argparse.BooleanOptionalAction, default=None, help=_help(name)
            )
        else:
            parser.add_argument(_option(name), default=None, metavar="VALUE", help=help_text)
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    for name in Settings.__struct_fields__:
        value = environment.get(ENV_PREFIX + name.upper())
        if name not in given and value:
            given[name] = value
    return make_settings(given)


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Checked settings from text or typed values."""
    values: dict[str, Any] = {}
    hints = Settings.__annotations__
    defaults = Settings()
    for name, value in given.items():
        kind = type(getattr(defaults, name))
        assert name in hints  # noqa: S101 - argparse knows no other names
        try:
            values[name] = msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError as error:
            raise SettingsError(f"{_option(name)}: {value!r} is not a valid {kind.__name__}") from error
    settings = Settings(**values)
    if bool(settings.routes) == bool(settings.registry):
        raise SettingsError("exactly one of --routes and --registry is needed")
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        raise SettingsError("--tls-certificate and --tls-key belong together")
    if not 1 <= settings.workers <= 256:
        raise SettingsError(f"--workers: {settings.workers} is not within 1..256")
    if not re.fullmatch(r"/[!-~]*", settings.health_path):
        raise SettingsError(f"--health-path: {settings.health_path!r} is no path of printable ASCII")
    for name in Settings.__struct_fields__:
        value = getattr(settings, name)
        if isinstance(value, int | float) and not _LEAST.get(name, 0) <= value < math.inf:
            raise SettingsError(f"{_option(name)}: {value} is not at least {_LEAST.get(name, 0)} and finite")
    split_address(settings.listen)
    return settings


def split_address(listen: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise SettingsError(f"--listen: {listen!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)
