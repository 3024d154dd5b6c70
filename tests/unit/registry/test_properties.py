"""What holds for every sequence of events."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modelfleet_serving.contract import (
    EndpointState,
    Heartbeat,
    ModelRoute,
    RouteSpec,
    TableUpdate,
    VariantRouteSpec,
)
from modelfleet_serving.registry.routes import InvalidRouteError, RouteConflictError
from modelfleet_serving.registry.state import Registry, Settings

NAMES = st.sampled_from(["m", "n", "o"])
IDS = st.sampled_from(["x", "y", "z"])


class Follower:
    """A router that applies what it is sent."""

    def __init__(self) -> None:
        self.epoch, self.version = "", -1
        self.models: dict[str, ModelRoute] = {}

    def apply(self, update: TableUpdate) -> None:
        if update.full:
            self.models = {}
        for name in update.removed:
            self.models.pop(name, None)
        self.models |= {m.name: m for m in update.models}
        self.epoch, self.version = update.epoch, update.version


class RegistryMachine(RuleBasedStateMachine):
    """Routers that follow now and then against the whole table; heartbeats in any order against a model."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.registry = Registry("e", 0.0, Settings(settle=0.0, lease=5.0, stall=100.0))
        self.sequence = 0
        self.sent: list[Heartbeat] = []
        self.newest: dict[str, tuple[Heartbeat, float]] = {}
        self.left: dict[str, int] = {}
        self.routers = [Follower(), Follower()]

    @rule(name=IDS, model=NAMES, revision=st.sampled_from(["r1", "r2"]), gone=st.booleans(),
          state=st.sampled_from(EndpointState))  # fmt: skip
    def heartbeat(self, name: str, model: str, revision: str, gone: bool, state: EndpointState) -> None:
        self.sequence += 1
        self.deliver(
            Heartbeat(
                id=name,
                application=f"default.{model}.a.{revision}",
                model=model,
                url=f"http://127.0.0.1/{name}",
                state=state,
                sequence=self.sequence,
                gone=gone,
            )
        )

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def heartbeat_again(self, data: st.DataObject) -> None:
        """The network repeats an old one."""
        self.deliver(data.draw(st.sampled_from(self.sent)))

    def deliver(self, beat: Heartbeat) -> None:
        self.registry.heartbeat(beat, self.now)
        self.sent.append(beat)
        known = self.newest.get(beat.id)
        if beat.sequence <= max(known[0].sequence if known else -1, self.left.get(beat.id, -1)):
            return
        if beat.gone:
            self.left[beat.id] = beat.sequence
            self.newest.pop(beat.id, None)
        else:
            self.newest[beat.id] = (beat, self.now + self.registry.lease)

    @rule(deployment=NAMES, name=NAMES, weights=st.dictionaries(st.sampled_from(["r1", "r2"]),
          st.integers(0, 2)), adapters=st.lists(NAMES, max_size=1))  # fmt: skip
    def put(self, deployment: str, name: str, weights: dict[str, int], adapters: list[str]) -> None:
        before = self.registry.table.since("", -1)
        try:
            self.registry.put_route(
                RouteSpec(
                    name=name,
                    namespace="default",
                    deployment=deployment,
                    variants=[VariantRouteSpec(name="a", revisions=weights)],
                    adapters=adapters,
                ),
                self.now,
            )
        except (RouteConflictError, InvalidRouteError):
            assert self.registry.table.since("", -1) == before, "a refusal changes nothing"

    @rule(deployment=NAMES)
    def delete(self, deployment: str) -> None:
        self.registry.delete_route("default", deployment)

    @rule(which=st.integers(0, 1))
    def follow(self, which: int) -> None:
        router = self.routers[which]
        update = self.registry.table.since(router.epoch, router.version)
        router.apply(update)
        assert router.models == {m.name: m for m in update_all(self.registry)}

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.registry.tick(self.now)
        expired = [name for name, (_, until) in self.newest.items() if until <= self.now]
        for name in expired:
            del self.newest[name]
        # A replica whose lease ended may come back with anything: nothing is remembered of it.
        self.sent = [b for b in self.sent if b.id not in expired]
        self.left = {name: seq for name, seq in self.left.items() if name not in expired}
        if self.now > 50:
            self.sent.clear()  # no heartbeat is under way that long

    @invariant()
    def knows_exactly_the_newest(self) -> None:
        known = {beat.id: beat for beat in self.registry.endpoints}
        assert known == {name: beat for name, (beat, _) in self.newest.items()}

    @invariant()
    def names_are_unique(self) -> None:
        names = [n for m in update_all(self.registry) for n in (m.name, *m.adapters)]
        assert len(names) == len(set(names))

    @invariant()
    def an_endpoint_is_routed_once_at_most(self) -> None:
        ids = [e.id for m in update_all(self.registry) for v in m.variants for e in v.endpoints]
        assert len(ids) == len(set(ids))

    @invariant()
    def versions_are_not_ahead(self) -> None:
        assert self.registry.confirmed(self.now) <= self.registry.table.version


def update_all(registry: Registry) -> list[ModelRoute]:
    return registry.table.since("", -1).models


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
