from __future__ import annotations

import asyncio
import importlib.util
import shlex
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import ModuleType

import pytest
import uvloop
from tests.unit.router.harness import Harness, harness

from modelfleet_serving.router.event_loop import DataPathLoop
from modelfleet_serving.router_native import C_SOURCES, PACKAGE

_BOTH = ("test_transport.py", "test_opening.py")
"""Of sockets: they are to work on uvloop's event loop, too."""


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The router's tests run on the event loop that it runs on; its sockets' own on that of TLS, too."""
    own: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"data-path": DataPathLoop}
    return own | {"uvloop": uvloop.new_event_loop} if item.path.name in _BOTH else own


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with harness() as running:
        yield running


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The C sources, compiled with all warnings as errors."""
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C compiler ({compiler[0]}) on this machine")
    target = tmp_path_factory.mktemp("wire") / "_wire.so"
    flags = ["-shared", "-fPIC", "-O2", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    sources = [str(PACKAGE / name) for name in C_SOURCES]
    include = f"-I{sysconfig.get_paths()['include']}"
    subprocess.run([*compiler, *flags, include, *sources, "-o", str(target)], check=True, timeout=60)
    spec = importlib.util.spec_from_file_location("_wire", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection that don't block."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far
