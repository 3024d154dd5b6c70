from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop
from tests.unit.router.harness import Harness, harness


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], uvloop.Loop]]:
    """The router's tests run on the event loop that it runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with harness() as running:
        yield running
