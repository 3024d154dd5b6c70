from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop
from tests.unit.router.harness import Harness, harness

from modelfleet_serving.router.event_loop import DataPathLoop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The router's tests run on the event loop that it runs on; its sockets' own on that of TLS, too."""
    own: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"data-path": DataPathLoop}
    return own | {"uvloop": uvloop.new_event_loop} if item.path.name == "test_transport.py" else own


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with harness() as running:
        yield running
