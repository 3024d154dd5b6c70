"""The registry's core, with time as a number."""

from __future__ import annotations

import pytest
from tests.unit.registry.build import beat, route

from modelfleet_serving.contract import (
    DemandReport,
    EndpointState,
    ModelDemand,
    VariantRouteSpec,
)
from modelfleet_serving.registry.endpoints import TooManyError, UnknownApplicationError
from modelfleet_serving.registry.routes import InvalidRouteError, RouteConflictError
from modelfleet_serving.registry.state import Registry, Settings


def settled(settings: Settings | None = None) -> tuple[Registry, float]:
    registry = Registry("e1", now=0.0, settings=settings)
    registry.put_route(route(), now=0.0)
    now = 0.0
    while registry.warming:
        now += 1.0
        registry.tick(now)
        assert now < 60
    return registry, now


def endpoints(registry: Registry, model: str = "m") -> dict[str, EndpointState]:
    update = registry.table.since("", -1)
    found = next(m for m in update.models if m.name == model)
    return {e.id: e.state for v in found.variants for e in v.endpoints}


def test_an_endpoint_joins_changes_and_leaves() -> None:
    registry, now = settled()
    registry.heartbeat(beat("x", 1, state=EndpointState.STARTING), now)
    assert endpoints(registry) == {"x": EndpointState.STARTING}
    registry.heartbeat(beat("x", 2), now)
    assert endpoints(registry) == {"x": EndpointState.READY}
    registry.heartbeat(beat("x", 3, gone=True), now)
    assert endpoints(registry) == {}


def test_a_late_heartbeat_never_overwrites_a_newer_one() -> None:
    registry, now = settled()
    registry.heartbeat(beat("x", 5, state=EndpointState.DRAINING), now)
    registry.heartbeat(beat("x", 4), now)
    assert endpoints(registry) == {"x": EndpointState.DRAINING}
    registry.heartbeat(beat("x", 6, gone=True), now)
    registry.heartbeat(beat("x", 5), now)
    assert endpoints(registry) == {}, "it has left; what it said before must not bring it back"


def test_a_heartbeat_without_news_changes_no_version() -> None:
    registry, now = settled()
    registry.heartbeat(beat("x", 1), now)
    before = (registry.table.version, registry.state_version)
    registry.heartbeat(beat("x", 2), now + 1)
    assert (registry.table.version, registry.state_version) == before


def test_a_message_is_news_for_the_operator_alone() -> None:
    registry, now = settled()
    registry.heartbeat(beat("x", 1), now)
    table, state = registry.table.version, registry.state_version
    registry.heartbeat(beat("x", 2, reason="EngineExited", message="boom", restarts=1), now)
    assert registry.table.version == table
    assert registry.state_version > state


def test_the_lease_ends() -> None:
    registry, now = settled()
    registry.heartbeat(beat("x", 1), now)
    lease = registry.lease
    for step in range(int(lease)):
        registry.tick(now + step)
        assert endpoints(registry) == {"x": EndpointState.READY}
    registry.tick(now + lease)
    assert endpoints(registry) == {}


def test_who_is_killed_is_dropped_long_before_the_lease_ends() -> None:
    registry, now = settled()
    registry.connected("x")
    registry.heartbeat(beat("x", 1), now)
    registry.disconnected("x", now)
    registry.tick(now + 1)
    assert endpoints(registry) == {"x": EndpointState.READY}
    registry.tick(now + registry.settings.reconnect)
    assert endpoints(registry) == {}


def test_who_lives_only_reconnects() -> None:
    registry, now = settled()
    registry.connected("x")
    registry.heartbeat(beat("x", 1), now)
    registry.disconnected("x", now)
    registry.heartbeat(beat("x", 2), now + 1)
    registry.connected("x")
    registry.connected("x")
    registry.disconnected("x", now + 1)  # an old connection, whose end is heard of late
    for step in range(2, int(registry.lease)):
        registry.tick(now + step)
        assert endpoints(registry) == {"x": EndpointState.READY}


def test_incidents_are_counted_while_their_variant_is_there() -> None:
    def counted() -> dict[str, tuple[str, int, int]]:
        return {v: (c.model, c.restarts, c.lost) for v, c in registry.endpoints.incidents}

    registry, now = settled()
    registry.heartbeat(beat("x", 7, restarts=5), now)
    assert counted() == {"a": ("m", 0, 0)}, "what came before us may have been counted before"
    registry.heartbeat(beat("x", 8, restarts=7), now)
    registry.heartbeat(beat("y", 1), now)
    registry.heartbeat(beat("y", 2, gone=True), now)
    assert counted() == {"a": ("m", 2, 0)}
    for step in range(int(registry.lease) + 1):
        registry.tick(now + step)
    assert counted() == {"a": ("m", 2, 1)}
    registry.delete_route("default", "m")
    assert counted() == {}


def test_a_registry_that_stood_still_drops_nobody() -> None:
    registry, now = settled()
    registry.heartbeat(beat("x", 1), now)
    registry.tick(now + 300)
    assert endpoints(registry) == {"x": EndpointState.READY}


def test_an_address_belongs_to_the_last_who_reported_it() -> None:
    registry, now = settled()
    registry.heartbeat(beat("old", 9, url="http://127.0.0.1:1"), now)
    registry.heartbeat(beat("new", 1, url="http://127.0.0.1:1"), now)
    assert endpoints(registry) == {"new": EndpointState.READY}


def test_only_revisions_with_a_weight_are_routed() -> None:
    registry, now = settled()
    registry.heartbeat(beat("x", 1), now)
    registry.heartbeat(beat("y", 1, application="default.m.a.r2"), now)
    assert set(endpoints(registry)) == {"x"}
    both = [VariantRouteSpec(name="a", revisions={"r1": 90, "r2": 10})]
    registry.put_route(route(variants=both), now)
    (variant,) = registry.table.since("", -1).models[0].variants
    assert variant.revision_weights == {"r1": 90, "r2": 10}
    assert {e.id: e.revision for e in variant.endpoints} == {"x": "r1", "y": "r2"}
    registry.put_route(route(variants=[VariantRouteSpec(name="a", revisions={"r1": 0, "r2": 100})]), now)
    assert set(endpoints(registry)) == {"y"}
    registry.put_route(route(variants=[VariantRouteSpec(name="a")], suspended=True), now)
    (model,) = registry.table.since("", -1).models
    assert model.suspended
    assert not endpoints(registry)


@pytest.mark.parametrize("taken", ["m", "lora"])
def test_a_name_stays_with_the_first(taken: str) -> None:
    registry, now = settled()
    registry.put_route(route(adapters=["lora"]), now)
    with pytest.raises(RouteConflictError, match="default/m"):
        registry.put_route(route("other", name=taken), now)
    with pytest.raises(RouteConflictError, match="default/m"):
        registry.put_route(route("other", adapters=[taken]), now)
    registry.delete_route("default", "m")
    registry.put_route(route("other", name=taken), now)
    assert [m.name for m in registry.table.since("", -1).models] == [taken]


def test_a_renamed_model_frees_its_name() -> None:
    registry, now = settled()
    version = registry.table.version
    registry.put_route(route(name="n"), now)
    update = registry.table.since("e1", version)
    assert ([m.name for m in update.models], update.removed, update.full) == (["n"], ["m"], False)
    registry.put_route(route("other", name="m"), now)


@pytest.mark.parametrize(
    "bad",
    [
        route(adapters=["m"]),
        route(weights={"b": 1}),
        route(fallback=["b"]),
        route(weights={"a": -1}),
        route(variants=[VariantRouteSpec(name="a"), VariantRouteSpec(name="a")]),
    ],
)
def test_a_route_that_contradicts_itself_is_refused(bad: object) -> None:
    registry, now = settled()
    with pytest.raises(InvalidRouteError):
        registry.put_route(bad, now)  # type: ignore[arg-type]


def test_strangers_are_refused() -> None:
    registry, now = settled()
    with pytest.raises(UnknownApplicationError):
        registry.heartbeat(beat("x", 1, application="serve"), now)


def test_bounds() -> None:
    registry, now = settled(Settings(max_replicas=1, max_routers=1, max_routes=1))
    registry.heartbeat(beat("x", 1), now)
    registry.heartbeat(beat("x", 2), now)
    with pytest.raises(TooManyError):
        registry.heartbeat(beat("y", 1), now)
    registry.open_poll("r", "e1", 1, now)
    with pytest.raises(TooManyError):
        registry.open_poll("s", "e1", 1, now)
    with pytest.raises(TooManyError):
        registry.put_route(route("second"), now)


def test_the_interval_grows_with_the_replicas() -> None:
    registry, now = settled(Settings(heartbeats_per_second=10))
    assert registry.interval == 1.0
    for number in range(100):
        reply = registry.heartbeat(beat(f"x{number}", 1), now)
    assert reply.interval_seconds == 10.0
    assert reply.lease_seconds >= 4 * reply.interval_seconds


class TestWarming:
    def test_it_says_nothing_before_it_has_routes(self) -> None:
        registry = Registry("e1", now=0.0)
        for now in range(200):
            registry.tick(float(now))
        assert registry.warming

    def test_it_settles_without_routes_once_it_knows_that_there_are_none(self) -> None:
        registry = Registry("e1", now=0.0)
        registry.complete_routes()
        registry.tick(0.0)
        assert registry.warming, "replicas that were there before may still turn up"
        before = registry.state_version
        registry.tick(60.0)
        assert not registry.warming
        assert registry.state_version > before, "the operator hears of it"

    def test_it_waits_until_nothing_turns_up_any_more(self) -> None:
        registry = Registry("e1", now=0.0)
        registry.put_route(route(), 0.0)
        now = 0.0
        for number in range(20):
            now += 1.0
            registry.heartbeat(beat(f"x{number}", 100), now)
            registry.tick(now)
        assert registry.warming, "replicas that were there before still turn up"
        for _ in range(5):
            now += 1.0
            registry.tick(now)
        assert not registry.warming

    def test_new_replicas_do_not_hold_it_up(self) -> None:
        registry = Registry("e1", now=0.0)
        registry.put_route(route(), 0.0)
        for number in range(6):
            registry.heartbeat(beat(f"x{number}", 1, state=EndpointState.STARTING), float(number))
            registry.tick(float(number))
        assert not registry.warming

    def test_it_ends_in_any_case(self) -> None:
        registry = Registry("e1", now=0.0)
        registry.put_route(route(), 0.0)
        for number in range(100):
            registry.heartbeat(beat(f"x{number}", 100), float(number))
            registry.tick(float(number))
        assert not registry.warming

    def test_nothing_is_confirmed_meanwhile(self) -> None:
        registry = Registry("e1", now=0.0)
        reply = registry.heartbeat(beat("x", 100), 0.0)
        assert reply.confirmed_version < reply.table_version


class TestConfirmation:
    def test_the_slowest_router_decides(self) -> None:
        registry, now = settled()
        version = registry.table.version
        registry.open_poll("r", "e1", version, now)
        registry.open_poll("s", "e1", version, now)
        reply = registry.heartbeat(beat("x", 1), now)
        assert reply.confirmed_version == version == reply.table_version - 1
        registry.close_poll("r", now)
        registry.open_poll("r", "e1", reply.table_version, now)
        assert registry.confirmed(now) == version
        registry.close_poll("s", now)
        registry.open_poll("s", "e1", reply.table_version, now)
        assert registry.confirmed(now) == reply.table_version

    def test_a_router_that_left_holds_up_nobody(self) -> None:
        registry, now = settled()
        registry.open_poll("r", "e1", registry.table.version, now)
        reply = registry.heartbeat(beat("x", 1), now)
        registry.close_poll("r", now)
        assert registry.confirmed(now + 1) < reply.table_version
        assert registry.confirmed(now + 6) == reply.table_version

    def test_an_open_poll_keeps_a_router_alive(self) -> None:
        registry, now = settled()
        registry.open_poll("r", "e1", registry.table.version, now)
        for step in range(30):
            registry.heartbeat(beat("x", step + 1), now + step)
            registry.tick(now + step)
        assert registry.confirmed(now + 30) < registry.table.version

    def test_a_table_of_another_epoch_is_none_of_ours(self) -> None:
        registry, now = settled()
        registry.open_poll("r", "before", 1000, now)
        assert registry.confirmed(now) == 0

    def test_an_old_report_does_not_take_a_confirmation_back(self) -> None:
        registry, now = settled()
        version = registry.table.version
        registry.open_poll("r", "e1", version, now)
        registry.demand(DemandReport(router="r", epoch="e1", version=version - 1), now)
        assert registry.confirmed(now) == version


class TestDemand:
    def test_it_is_summed_over_routers_and_the_last_minute(self) -> None:
        registry, now = settled()
        for router, queued in (("r", 1), ("s", 2)):
            registry.demand(
                DemandReport(
                    router=router,
                    models=[
                        ModelDemand(
                            model="m",
                            variant="a",
                            in_flight=3,
                            queued=queued,
                            requests=10,
                            time_to_first_byte_seconds=float(queued),
                        )
                    ],
                ),
                now,
            )
        (total,) = registry.state(now).demand
        assert (total.in_flight, total.queued, total.requests) == (6, 3, 20)
        assert total.time_to_first_byte_seconds == pytest.approx(1.5)
        registry.demand(DemandReport(router="r"), now + 30)
        (total,) = registry.state(now + 30).demand
        assert (total.in_flight, total.queued, total.requests) == (3, 2, 20)
        for step in range(31, 61):
            registry.tick(now + step)
        assert registry.state(now + 61).demand == [], "the minute is over and the routers have left"

    def test_the_first_request_wakes_the_operator_at_once(self) -> None:
        registry, now = settled()
        registry.demand(DemandReport(router="r"), now)
        before = registry.state_version
        registry.demand(DemandReport(router="r", models=[ModelDemand(model="m", queued=1)]), now)
        first = registry.state_version
        assert first > before
        registry.demand(DemandReport(router="r", models=[ModelDemand(model="m", queued=2)]), now + 1)
        registry.tick(now + 1)
        assert registry.state_version == first, "steady traffic doesn't"
        registry.demand(DemandReport(router="r", models=[ModelDemand(model="m", queued=3)]), now + 5)
        registry.tick(now + 6)
        assert registry.state_version > first, "but it is told now and then"

    def test_an_idle_router_wakes_nobody(self) -> None:
        registry, now = settled()
        idle = DemandReport(router="r", models=[ModelDemand(model="m", variant="a")])
        registry.demand(idle, now)
        before = registry.state_version
        for step in range(20):
            registry.demand(idle, now + step)
            registry.tick(now + step)
        assert registry.state_version == before
