"""What is free in a pool while a plan is being made: every reservation is taken off before the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelfleet_operator.planner.types import AcceleratorGroup, NodeCapacity

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Demand:
    """What one pipeline stage of a replica takes of one node.

    Attributes:
        gpus: whole accelerators, or a share of one below 1; 0 on CPU nodes.
        cpus: cores.
        memory_gib: host memory.
        nodes: pipeline stages, each with this demand.
    """

    gpus: float
    cpus: float
    memory_gib: float
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class _Node:
    """State of a node; equal nodes are counted, not listed."""

    gpus: tuple[float, ...]
    cpus: float
    memory_gib: float
    running: bool

    def after(self, demand: Demand) -> _Node | None:
        """The node with the demand taken off; ``None`` where it does not fit."""
        if demand.cpus > self.cpus + EPSILON or demand.memory_gib > self.memory_gib + EPSILON:
            return None
        gpus = _take(self.gpus, demand.gpus)
        if gpus is None:
            return None
        return _Node(gpus, self.cpus - demand.cpus, self.memory_gib - demand.memory_gib, self.running)

    @property
    def free(self) -> float:
        return sum(self.gpus)


def _take(gpus: tuple[float, ...], wanted: float) -> tuple[float, ...] | None:
    """Shares left after taking ``wanted``: whole accelerators, or a part of the fullest that has room."""
    if wanted <= 0:
        return gpus
    if wanted < 1:
        room = [share for share in gpus if share + EPSILON >= wanted]
        if not room:
            return None
        left = list(gpus)
        left.remove(min(room))
        rest = min(room) - wanted
        return tuple(sorted([*left, max(rest, 0.0)]))
    whole = [share for share in gpus if share >= 1 - EPSILON]
    if len(whole) < wanted:
        return None
    left = sorted(gpus)
    return tuple(left[: len(left) - int(wanted)] + [0.0] * int(wanted)) if wanted else gpus


@dataclass
class GroupCapacity:
    """Free capacity of one group; changes as replicas are placed."""

    group: AcceleratorGroup
    nodes: Counter[_Node] = field(default_factory=Counter)
    obtainable: int = 0

    @classmethod
    def of(cls, group: AcceleratorGroup) -> GroupCapacity:
        """Capacity as observed."""
        nodes = Counter[_Node]()
        for node in group.nodes:
            nodes[_node(node, running=True)] += node.count
        return cls(group, nodes, 0 if group.pending_too_long else group.obtainable_nodes)

    def whole(self) -> GroupCapacity:
        """The same group with nothing reserved, pending or not: what could ever be."""
        every = Counter[_Node]()
        for node in self.group.nodes:
            every[_node(_emptied(node), running=True)] += node.count
        return GroupCapacity(self.group, every, self.group.obtainable_nodes)

    def place(self, demand: Demand) -> bool | None:
        """Reserve one replica.

        Returns:
            Whether running nodes hold all of it, or ``None`` where it does not fit and nothing was taken.
        """
        before, left = self.nodes.copy(), self.obtainable
        running = True
        for _ in range(demand.nodes):
            placed = self._place_stage(demand)
            if placed is None:
                self.nodes, self.obtainable = before, left
                return None
            running &= placed
        return running

    def place_many(self, demand: Demand, replicas: int) -> int:
        """Reserve up to this many equal replicas; how many fitted.

        The same outcome as placing them one by one, but whole nodes at a time: a replica goes to the fullest
        node that has room, which then is the fullest for the next one, too.
        """
        left = replicas * demand.nodes
        while left:
            node = min((n for n in self.nodes if n.after(demand)), key=_tightness, default=None)
            new = node is None
            if node is None:
                if self.obtainable < 1 or self.group.template is None:
                    break
                node = _node(self.group.template, running=False)
            steps, full = 0, node
            while steps < left and (after := full.after(demand)) is not None:
                steps, full = steps + 1, after
            if not steps:
                break
            nodes = min(self.obtainable if new else self.nodes[node], left // steps)
            if new:
                self.obtainable -= nodes
            else:
                self.nodes[node] -= nodes
                if not self.nodes[node]:
                    del self.nodes[node]
            self.nodes[full] += nodes
            left -= nodes * steps
        return replicas - -(-left // demand.nodes)

    def _place_stage(self, demand: Demand) -> bool | None:
        chosen: tuple[_Node, _Node] | None = None
        for node in self.nodes:
            after = node.after(demand)
            if after is not None and (chosen is None or _tightness(node) < _tightness(chosen[0])):
                chosen = (node, after)
        if chosen is None:
            chosen = self._new_node(demand)
        if chosen is None:
            return None
        node, after = chosen
        self.nodes[node] -= 1
        if not self.nodes[node]:
            del self.nodes[node]
        self.nodes[after] += 1
        return after.running

    def _new_node(self, demand: Demand) -> tuple[_Node, _Node] | None:
        template = self.group.template
        if self.obtainable < 1 or template is None:
            return None
        node = _node(template, running=False)
        after = node.after(demand)
        if after is None:
            return None
        self.obtainable -= 1
        self.nodes[node] += 1
        return node, after


def _tightness(node: _Node) -> tuple[bool, float, float, float]:
    """Running nodes first, then the fullest that has room: large holes stay for large replicas."""
    return (not node.running, node.free, node.memory_gib, node.cpus)


def _node(node: NodeCapacity, *, running: bool) -> _Node:
    return _Node(tuple(sorted(node.gpus)), node.cpus, node.memory_gib, running)


def _emptied(node: NodeCapacity) -> NodeCapacity:
    return NodeCapacity((1.0,) * len(node.gpus), node.cpus, node.memory_gib, node.count)


def node_shape(group: AcceleratorGroup) -> NodeCapacity:
    """The most that one node of a group has: what a replica's stage must fit into."""
    nodes: Iterable[NodeCapacity] = [*group.nodes, *([group.template] if group.template else [])]
    gpus, cpus, memory = 0, 0.0, 0.0
    for node in nodes:
        gpus, cpus, memory = max(gpus, len(node.gpus)), max(cpus, node.cpus), max(memory, node.memory_gib)
    return NodeCapacity((1.0,) * gpus, cpus, memory)


def node_count(group: AcceleratorGroup) -> int:
    """Nodes that there are or may be."""
    return sum(node.count for node in group.nodes) + group.obtainable_nodes
