"""Client of Ray's state API: which nodes are alive, with which accelerators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

from modelfleet_operator.clients.http import JsonClient

_PATH: Final = "/api/v0/nodes"
_QUERY: Final = {"detail": "true", "limit": "10000", "filter_keys": "state", "filter_predicates": "=",
                 "filter_values": "ALIVE"}  # fmt: skip


class _Node(msgspec.Struct):
    state: str = ""
    is_head_node: bool = False
    resources_total: dict[str, float] | None = None


class _Result(msgspec.Struct):
    result: list[_Node] = []


class _Data(msgspec.Struct):
    result: _Result = msgspec.field(default_factory=_Result)


class _Answer(msgspec.Struct):
    data: _Data = msgspec.field(default_factory=_Data)


@dataclass(frozen=True)
class RayNode:
    """One node that is alive."""

    resources: dict[str, float] = field(default_factory=dict)
    head: bool = False


class RayNodesClient(JsonClient):
    """Calls the dashboard of one Ray cluster."""

    async def nodes(self) -> list[RayNode]:
        """Nodes that are alive.

        Raises:
            UnavailableError: the dashboard does not answer.
            RefusedError: the token is wrong.
        """
        status, content = await self.call("GET", _PATH, query=_QUERY)
        if status == 404:
            return []
        answer: _Answer = self.decode(content, _Answer)
        return [
            RayNode(dict(n.resources_total or {}), n.is_head_node)
            for n in answer.data.result.result
            if n.state in ("ALIVE", "")
        ]
