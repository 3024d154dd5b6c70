"""The reconcile step: what runs, what routers know, what users read."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.reconcile.world import REGISTRY, World, condition, deployment, plan, settle, step

from modelfleet_operator.api import ModelDeployment, ReplicaBounds
from modelfleet_operator.planner.types import PlanResult, Rejection, Rule
from modelfleet_operator.reconcile.applications import ApplicationState, application_args, revision
from modelfleet_operator.reconcile.autoscale import SCALE_DOWN_SECONDS, wanted_replicas
from modelfleet_operator.reconcile.conditions import Finding, with_times
from modelfleet_operator.reconcile.observed import PoolSight
from modelfleet_serving.contract import (
    ApplicationArgs,
    EndpointState,
    EngineSettings,
    ModelDemand,
    parse_application_name,
)

PLANS = {"a": plan(), "b": plan("T4")}


def of(resource: ModelDeployment, variant: str) -> str:
    (found,) = [v for v in resource.spec.variants if v.name == variant]
    result = PLANS[variant].plan
    assert result is not None
    return revision(resource, found, result)


def changed(base: dict[str, Any] | None = None, **engine: Any) -> ModelDeployment:
    return deployment(engine=engine, **(base or {}))


class TestRevision:
    def test_routing_replicas_and_rollout_change_no_engine(self) -> None:
        quiet = deployment(
            routing={"weights": {"a": 1}, "fallback": ["b"]},
            rollout={"drainTimeout": "5s"},
            variants=[{"name": "a", "replicas": {"min": 3}}, {"name": "b"}],
        )
        assert of(quiet, "a") == of(deployment(), "a")

    def test_every_engine_field_changes_it(self) -> None:
        specs: list[dict[str, Any]] = [
            {}, {"maxModelLen": 1}, {"version": "1"},
            {"args": {"x": 1}}, {"env": [{"name": "A", "value": "1"}]},
            {"type": "SGLang"}, {"prefixCaching": "Disabled"}, {"multimodal": {"images": 1}},
        ]  # fmt: skip
        assert len({of(changed(**s), "a") for s in specs}) == len(specs)
        assert of(deployment(model={"source": "hf://o/other"}), "a") != of(deployment(), "a")

    def test_adapters_change_it_with_the_first_and_the_last_alone(self) -> None:
        many = [{"name": f"l{n}", "source": f"hf://o/l{n}"} for n in range(9)]
        revisions = [of(deployment(adapters=many[:n]), "a") for n in range(10)]
        assert len(set(revisions[1:])) == 1
        assert revisions[0] != revisions[1]
        lora = [of(deployment(adapters=many[:n], engine={"lora": {"maxRank": 32}}), "a") for n in range(10)]
        assert len(set(lora)) == 1, "an engine with LoRA has room for the first one, too"

    def test_numbers_of_the_plan_do_not(self) -> None:
        resource = deployment()
        variant = resource.spec.variants[0]
        first, second = plan().plan, plan(kv_cache_gib=9.0, max_model_len=8192).plan
        third = plan("A100-40G").plan
        assert first
        assert second
        assert third
        assert revision(resource, variant, first) == revision(resource, variant, second)
        assert revision(resource, variant, first) != revision(resource, variant, third)

    def test_arguments_survive_the_wire(self) -> None:
        resource = changed(args={"a": [1, "x", {"b": None}]}, env=[{"name": "A", "value": "1"}])
        found = PLANS["a"].plan
        assert found
        args = application_args(resource, resource.spec.variants[0], found, REGISTRY)
        again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(args)), ApplicationArgs)
        assert again == args
        assert parse_application_name(args.application) is not None


class TestRollout:
    def test_first_apply_starts_every_variant_and_serves(self) -> None:
        world = World()
        first = step(world, deployment(), PLANS)
        assert len(world.apps) == 2
        assert condition(first, "Serving") == ("False", "NoReadyEndpoint")
        assert condition(first, "Progressing")[0] == "True"
        last = settle(world, deployment(), PLANS)
        assert condition(last, "Ready") == ("True", "AllVariantsReady")
        assert condition(last, "Serving") == ("True", "EndpointsReady")
        assert condition(last, "Progressing") == ("False", "Complete")
        assert [(v.name, v.reason, v.ready_replicas) for v in last.variants] == [
            ("a", "Serving", 1),
            ("b", "Serving", 1),
        ]

    def test_a_weight_moves_traffic_and_touches_no_engine(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        before = dict(world.apps)
        decision = settle(world, deployment(routing={"weights": {"a": 9, "b": 1}}), PLANS)
        assert decision.route.weights == {"a": 9, "b": 1}
        assert world.apps == before
        assert len(world.started) == 2

    def test_a_new_revision_serves_before_the_old_one_goes(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        new = changed(maxModelLen=2048)
        for _ in range(8):
            decision = step(world, new, PLANS)
            assert world.ready("a") >= 1
            assert condition(decision, "Serving")[0] == "True"
            world.advance()
        assert {n.rsplit(".", 1)[1] for n in world.apps} == {of(new, "a"), of(new, "b")}

    def test_both_revisions_take_requests_while_the_new_one_comes_up(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        new = changed(maxModelLen=2048)
        decision = step(world, new, PLANS)
        assert decision.route.variants[0].revisions.keys() == {of(deployment(), "a"), of(new, "a")}

    def test_a_broken_revision_never_takes_the_old_one_away(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        new = changed(maxModelLen=2048)
        world.broken = {of(new, "a"), of(new, "b")}
        decision = settle(world, new, PLANS)
        assert world.ready("a") == world.ready("b") == 1
        assert condition(decision, "Serving")[0] == "True"
        assert condition(decision, "Ready") == ("False", "EngineFailed")
        back = settle(world, deployment(), PLANS)
        assert condition(back, "Ready")[0] == "True"
        assert len(world.apps) == 2

    def test_without_room_the_old_one_goes_first(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        new = changed(maxModelLen=2048)
        no_room = {"a": False, "b": True}
        step(world, new, PLANS, no_room)
        running = [n for n, a in world.apps.items() if n.split(".")[2] == "a" and not a.deleting]
        assert running == []
        assert world.ready("b") == 1
        settle(world, new, PLANS, no_room)
        assert world.ready("a") == 1

    def test_an_edit_in_the_middle_of_an_edit_keeps_what_serves(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        step(world, changed(maxModelLen=2048), PLANS)
        newest = changed(maxModelLen=1024)
        step(world, newest, PLANS)
        live = {
            n.rsplit(".", 1)[1] for n, a in world.apps.items() if n.split(".")[2] == "a" and not a.deleting
        }
        assert live == {of(deployment(), "a"), of(newest, "a")}

    def test_a_removed_variant_leaves_routes_and_ray(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        decision = settle(world, deployment(variants=[{"name": "a"}]), PLANS)
        assert [v.name for v in decision.route.variants] == ["a"]
        assert [n.split(".")[2] for n in world.apps] == ["a"]

    def test_what_cannot_be_planned_any_more_runs_on(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        away = Rejection("", Rule.MODEL_UNAVAILABLE, "hub away", retryable=True)
        lost = PlanResult(None, (away,), reason="ModelUnavailable", message="hub away")
        decision = settle(world, deployment(), {"a": lost, "b": PLANS["b"]})
        assert world.ready("a") == 1
        assert condition(decision, "Fits") == ("Unknown", "ModelUnavailable")
        assert condition(decision, "Serving")[0] == "True"
        assert of(deployment(), "a") in decision.route.variants[0].revisions

    def test_a_lost_registry_removes_nothing(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        world.registry_up = False
        new = changed(maxModelLen=2048)
        decision = settle(world, new, PLANS)
        assert world.ready("a") == 2  # old and new
        assert condition(decision, "Serving") == ("Unknown", "RegistryUnavailable")
        world.registry_up = True
        settle(world, new, PLANS)
        assert world.ready("a") == 1

    def test_a_newer_release_leaves_running_engines_alone(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        before = {n: a.config for n, a in world.apps.items()}
        upgraded = {"a": plan(engine=EngineSettings(type="vLLM", max_num_seqs=7)), "b": PLANS["b"]}
        settle(world, deployment(), upgraded)
        assert {n: a.config for n, a in world.apps.items()} == before

    def test_more_replicas_scale_in_place(self) -> None:
        world = World()
        settle(world, deployment(), PLANS)
        more = deployment(variants=[{"name": "a", "replicas": {"min": 3}}, {"name": "b"}])
        settle(world, more, PLANS)
        assert world.ready("a") == 3
        assert len(world.started) == 2


class TestScaling:
    def test_to_zero_leaves_the_application_out_and_the_route_in(self) -> None:
        world = World()
        lazy = deployment(variants=[{"name": "a", "replicas": {"min": 0, "max": 2}}])
        decision = settle(world, lazy, PLANS)
        assert world.apps == {}
        assert decision.variants[0].reason == "ScaledToZero"
        assert condition(decision, "Ready")[0] == "True"
        assert [v.name for v in decision.route.variants] == ["a"]

    def test_a_queued_request_starts_a_replica(self) -> None:
        world = World(demand=[ModelDemand(model="m", queued=1)])
        lazy = deployment(variants=[{"name": "a", "replicas": {"min": 0, "max": 2}}])
        settle(world, lazy, PLANS)
        assert world.ready("a") == 1

    @given(
        st.integers(0, 5), st.integers(1, 9), st.integers(0, 9), st.integers(0, 400), st.integers(0, 400),
        st.integers(1, 64), st.floats(0, 900),
    )  # fmt: skip
    def test_stays_within_bounds_and_never_shrinks_in_haste(
        self, low: int, span: int, current: int, in_flight: int, queued: int, capacity: int, calm: float
    ) -> None:
        bounds = ReplicaBounds(min=low, max=low + span)
        demand = ModelDemand(model="m", in_flight=in_flight, queued=queued)
        wanted = wanted_replicas(bounds, demand, capacity, current, calm)
        assert low <= wanted <= low + span or current < low
        if low <= current <= low + span and calm < SCALE_DOWN_SECONDS:
            assert wanted >= current


class TestObserved:
    def test_foreign_applications_are_kept_apart(self) -> None:
        states = {
            n: ApplicationState(n, "RUNNING") for n in ("theirs", "default.m.a.123abc", "modelfleet.registry")
        }
        sight = PoolSight()
        assert sight.see_applications(states) == {"default/m"}
        assert {a.name for a in sight.foreign} == {"theirs", "modelfleet.registry"}
        assert sight.keys() == {"default/m"}

    @given(
        st.from_regex(r"[a-z0-9-]{1,9}", fullmatch=True), st.from_regex(r"[a-z0-9.-]{1,9}", fullmatch=True)
    )
    def test_names_round_trip(self, namespace: str, name: str) -> None:
        if name.startswith(".") or name.endswith("."):
            return
        found = parse_application_name(f"{namespace}.{name}.v.abc123")
        assert found is not None
        assert (found.namespace, found.deployment, found.variant, found.revision) == (
            namespace,
            name,
            "v",
            "abc123",
        )


def test_transition_times_move_only_when_the_status_flips() -> None:
    first = with_times([Finding("Ready", "False", "Starting")], [], 1, "t1")
    second = with_times([Finding("Ready", "False", "Pending")], first, 2, "t2")
    third = with_times([Finding("Ready", "True", "Done")], second, 2, "t3")
    assert [c[0].last_transition_time for c in (first, second, third)] == ["t1", "t1", "t3"]
    assert second[0].reason == "Pending"
    assert second[0].observed_generation == 2


EDITS = st.sampled_from(
    [
        {}, {"engine": {"maxModelLen": 1024}}, {"engine": {"maxModelLen": 2048}},
        {"routing": {"weights": {"a": 3, "b": 1}}},
        {"variants": [{"name": "a", "replicas": {"min": 2}}, {"name": "b"}]},
        {"rollout": {"strategy": "Surge"}},
    ]
)  # fmt: skip
EVENTS = st.lists(
    st.one_of(EDITS, st.sampled_from(["advance", "registry", "kill", "remove", "step"])), max_size=25
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_whatever_happens_it_ends_as_wanted(events: list[Any]) -> None:
    """Edits, lost registries, dead replicas and applications removed by hand, in any order."""
    world, resource = World(), deployment()
    for event in events:
        match event:
            case "advance":
                world.advance()
            case "registry":
                world.registry_up = not world.registry_up
            case "kill":
                for app in world.apps.values():
                    app.replicas = app.replicas[1:]
            case "remove":
                world.apps = dict(list(world.apps.items())[1:])
            case dict():
                resource = deployment(**event)
        step(world, resource, PLANS)
    world.registry_up = True
    decision = settle(world, resource, PLANS)
    assert condition(decision, "Ready") == ("True", "AllVariantsReady")
    assert {n: a.wanted for n, a in world.apps.items()} == {a.name: a.replicas for a in decision.applications}
    assert len(world.apps) == 2
    assert all(s == EndpointState.READY for a in world.apps.values() for s in a.replicas)
    running = {n: a.config for n, a in world.apps.items()}
    settle(world, resource, PLANS)
    assert {n: a.config for n, a in world.apps.items()} == running


class TestAdapters:
    @staticmethod
    def serving(*names: str) -> ModelDeployment:
        adapters = [{"name": name, "source": f"file:///{name}"} for name in names]
        return deployment(adapters=adapters, engine={"lora": {}}, variants=[{"name": "a"}])

    def test_a_further_one_reaches_the_replicas_that_run(self) -> None:
        world = World()
        settle(world, self.serving("x"), PLANS)
        (app,) = world.apps.values()
        before, app.adapters = app.config["args"], ["x"]
        decision = step(world, self.serving("x", "y"), PLANS)
        assert (decision.variants[0].reason, decision.variants[0].message) == ("LoadingAdapters", "y")
        assert condition(decision, "Serving")[0] == "True"
        assert condition(decision, "Ready") == ("False", "LoadingAdapters")
        assert world.apps.keys() == {decision.applications[0].name}, "no other revision"
        assert app.config["args"] == before, "or Serve starts the replicas anew"
        (running,) = app.config["deployments"]
        assert [a["name"] for a in running["user_config"]["adapters"]] == ["x", "y"]
        app.adapters = ["x", "y"]
        assert condition(step(world, self.serving("x", "y"), PLANS), "Ready")[0] == "True"

    def test_one_that_does_not_load_is_named(self) -> None:
        world = World()
        settle(world, self.serving("x", "y"), PLANS)
        (app,) = world.apps.values()
        app.adapters, app.problems = ["x"], {"y": "there is no /y on this node", "gone": "of before"}
        decision = step(world, self.serving("x", "y"), PLANS)
        assert decision.variants[0].reason == "AdapterNotLoaded"
        assert decision.variants[0].message == "adapter y: there is no /y on this node"
        assert condition(decision, "Serving")[0] == "True"

    def test_an_old_revision_keeps_its_own(self) -> None:
        world = World()
        settle(world, self.serving("x"), PLANS)
        (old,) = world.apps
        changed = deployment(
            adapters=[{"name": "y", "source": "file:///y"}],
            engine={"lora": {}, "maxModelLen": 512},
            variants=[{"name": "a"}],
        )
        step(world, changed, PLANS)
        configs = {name: app.config["deployments"][0]["user_config"] for name, app in world.apps.items()}
        assert [a["name"] for a in configs.pop(old)["adapters"]] == ["x"]
        (new,) = configs.values()
        assert [a["name"] for a in new["adapters"]] == ["y"]


class TestTooLittleRoom:
    """Some of the replicas find room."""

    @staticmethod
    def short(by: int) -> PlanResult:
        rejection = Rejection("A10", Rule.NONE_FREE, "full", retryable=True)
        text = "3 of 5 replicas fit on A10: the others wait for room"
        return PlanResult(plan().plan, (rejection,), (), str(Rule.NONE_FREE), text, by)

    def test_those_run_and_the_rest_is_told(self) -> None:
        world = World()
        resource = deployment(variants=[{"name": "a", "replicas": {"min": 5}}])
        for _ in range(8):
            step(world, resource, {"a": self.short(2)})
            world.advance()
            for app in world.apps.values():
                app.replicas = app.replicas[:3]  # Ray has no room for more
        decision = step(world, resource, {"a": self.short(2)})
        assert [app.wanted for app in world.apps.values()] == [5]
        assert condition(decision, "Serving")[0] == "True"
        assert condition(decision, "Fits") == ("Unknown", "AcceleratorsNotFree")
        assert condition(decision, "Ready") == ("False", "AcceleratorsNotFree")
        assert "3 of 5 replicas fit" in decision.variants[0].message

    def test_demand_grows_into_what_there_is(self) -> None:
        world = World()
        resource = deployment(variants=[{"name": "a", "replicas": {"min": 1, "max": 9}}])
        settle(world, resource, {"a": plan()})
        world.demand = [ModelDemand(model="m", variant="a", in_flight=24 * 5)]
        last = settle(world, resource, {"a": self.short(2)})
        assert world.ready("a") == 3
        assert condition(last, "Ready")[0] == "True"
        assert condition(last, "Fits")[0] == "True"
