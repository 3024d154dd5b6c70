"""The operator's pure parts: claims, capacity, incremental plans, the RayCluster, events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfleet_operator.api import Condition, ModelDeployment, ServingPool, parse_object
from modelfleet_operator.events import event_type, turned
from modelfleet_operator.pending import PendingTracker
from modelfleet_operator.planner.capacity import Demand, GroupCapacity
from modelfleet_operator.planner.inputs import node_template, pool_view
from modelfleet_operator.planner.types import AcceleratorGroup, NodeCapacity
from modelfleet_operator.reconcile.applications import Application, ApplicationState, application_args
from modelfleet_operator.reconcile.claims import Claims
from modelfleet_operator.reconcile.nodes import accelerator_rows as rows_of
from modelfleet_operator.reconcile.nodes import alive_by_group, free_column, observed_view
from modelfleet_operator.reconcile.observed import Observed, PoolSight, Revision
from modelfleet_operator.reconcile.planning import PoolPlanner
from modelfleet_operator.reconcile.pool_status import accepted_pool
from modelfleet_operator.reconcile.ray_cluster import differs, engine_images, ray_cluster
from modelfleet_operator.settings import Settings, SettingsError
from modelfleet_serving.contract import EndpointState, EngineLoad, Heartbeat, ModelDemand, RegistryState


def deployment(name: str = "m", created: str = "", **spec: Any) -> ModelDeployment:
    base: dict[str, Any] = {
        "model": {"source": "hf://o/n"},
        "engine": {"type": "Simulator"},
        "variants": [{"name": "a", "accelerators": [{"type": "A10"}, {"type": "T4"}]}],
    }
    metadata = {"name": name, "generation": 1, "creationTimestamp": created}
    body = {"apiVersion": "modelfleet.io/v1alpha1", "kind": "ModelDeployment", "metadata": metadata}
    found = parse_object({**body, "spec": base | spec})
    assert isinstance(found, ModelDeployment)
    return found


def pool(*groups: dict[str, Any], **ray: Any) -> ServingPool:
    accelerators = list(groups) or [{"type": "A10", "gpusPerNode": 2, "maxNodes": 2}]
    spec = {"ray": ray or {"address": "http://r:8265"}, "accelerators": accelerators}
    body = {
        "apiVersion": "modelfleet.io/v1alpha1",
        "kind": "ServingPool",
        "metadata": {"name": "p", "uid": "u"},
    }
    found = parse_object({**body, "spec": spec})
    assert isinstance(found, ServingPool)
    return found


class TestClaims:
    def test_the_oldest_keeps_a_name_and_gives_it_back(self) -> None:
        claims = Claims()
        model = {"name": "x", "source": "hf://o/n"}
        young = deployment("young", "2026-01-02T00:00:00Z", model=model)
        old = deployment("old", "2026-01-01T00:00:00Z", model=model)
        claims.add(young)
        assert not claims.conflicts("default/young")
        assert claims.add(old) == {"default/young", "default/old"}
        assert claims.conflicts("default/young") == {"x": "default/old"}
        assert not claims.conflicts("default/old")
        assert claims.remove("default/old") == {"default/young"}
        assert not claims.conflicts("default/young")

    @given(st.permutations(range(5)))
    def test_the_order_of_events_does_not_matter(self, order: list[int]) -> None:
        claims = Claims()
        model = {"name": "x", "source": "hf://o/n"}
        for number in order:
            claims.add(deployment(f"m{number}", f"2026-01-0{number + 1}T00:00:00Z", model=model))
        holders = [n for n in range(5) if not claims.conflicts(f"default/m{n}")]
        assert holders == [0]


class TestCapacity:
    @settings(max_examples=200)
    @given(
        st.lists(st.integers(0, 8), max_size=5), st.integers(0, 4), st.integers(0, 8),
        st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.integers(1, 2), st.integers(0, 40),
    )  # fmt: skip
    def test_placing_many_takes_what_placing_one_by_one_takes(
        self, free: list[int], obtainable: int, size: int, gpus: float, stages: int, replicas: int
    ) -> None:
        group = AcceleratorGroup(
            "A10",
            nodes=tuple(NodeCapacity((1.0,) * count, 8.0, 32.0) for count in free),
            template=NodeCapacity((1.0,) * size, 8.0, 32.0),
            obtainable_nodes=obtainable,
        )
        demand = Demand(gpus, 1.0, 1.0, stages)
        single, bulk = GroupCapacity.of(group), GroupCapacity.of(group)
        placed = 0
        while placed < replicas and single.place(demand) is not None:
            placed += 1
        assert bulk.place_many(demand, replicas) == placed


class TestPlanner:
    def test_keeps_what_is_planned_and_uses_what_is_given_back(self) -> None:
        planner = PoolPlanner()
        planner.set_view(pool_view(pool({"type": "A10", "gpusPerNode": 1, "maxNodes": 1})), declared=True)
        first, second = deployment("first"), deployment("second")
        assert planner.plan({first.key: first}, {}, {}) == {first.key}
        planner.plan({second.key: second}, {}, {})
        assert planner.results[first.key]["a"].fits
        assert not planner.results[second.key]["a"].fits
        assert planner.plan({first.key: first}, {}, {}) == set()
        planner.forget(first.key)
        assert planner.plan({}, {}, {}) == {second.key}
        assert planner.results[second.key]["a"].fits

    def test_what_a_removed_variant_holds_is_not_planned_with_until_it_is_gone(self) -> None:
        planner = PoolPlanner()
        planner.set_view(pool_view(pool({"type": "A10", "gpusPerNode": 1, "maxNodes": 1})), declared=True)
        before = deployment()
        planner.plan({before.key: before}, {}, {})
        planned = planner.results[before.key]["a"].plan
        assert planned is not None
        config = Application(
            application_args(before, before.spec.variants[0], planned, "http://r"), 1
        ).config()
        running = ApplicationState("default.m.a.123456", "RUNNING", config=config, total_replicas=1)
        seen = {before.key: Observed({"a": {"123456": Revision(running)}})}
        renamed = deployment(variants=[{"name": "b", "accelerators": [{"type": "A10"}]}])
        planner.plan({renamed.key: renamed}, {}, seen)
        assert planner.results[renamed.key]["b"].reason == "AcceleratorsNotFree"
        planner.plan({renamed.key: renamed}, {}, {})
        assert planner.results[renamed.key]["b"].fits

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=25))
    def test_never_plans_more_than_there_is(self, steps: list[tuple[int, int]]) -> None:
        planner = PoolPlanner()
        groups = (
            {"type": "A10", "gpusPerNode": 2, "maxNodes": 2},
            {"type": "T4", "gpusPerNode": 1, "maxNodes": 1},
        )
        planner.set_view(pool_view(pool(*groups)), declared=True)
        asked: dict[str, int] = {}
        for number, replicas in steps:
            name = f"m{number}"
            asked[f"default/{name}"] = replicas
            if replicas == 0:
                planner.forget(f"default/{name}")
                planner.plan({}, {}, {})
                continue
            choice = [
                {
                    "name": "a",
                    "accelerators": [{"type": "A10"}, {"type": "T4"}],
                    "replicas": {"min": replicas},
                }
            ]
            wanted = deployment(name, variants=choice)
            planner.plan({wanted.key: wanted}, {}, {})
            held: dict[str, float] = {"A10": 0, "T4": 0}
            for key, results in planner.results.items():
                if (plan := results["a"].plan) is not None:
                    placed = asked[key] - results["a"].short
                    held[plan.accelerator] += plan.accelerators_per_replica * placed
            assert held["A10"] <= 4
            assert held["T4"] <= 1


class TestSight:
    @staticmethod
    def state(**fields: Any) -> RegistryState:
        beat = Heartbeat(
            id="r", application="default.m.a.123456", model="m", url="http://e", state=EndpointState.READY,
            **{"sequence": 1} | fields,
        )  # fmt: skip
        return RegistryState(epoch="e", version=1, endpoints=[beat])

    def test_load_and_sequence_change_nothing(self) -> None:
        sight = PoolSight()
        assert sight.see_registry(self.state())[0] == {"default/m"}
        busy = self.state(sequence=9, load=EngineLoad(running=5, kv_cache_usage=0.9))
        assert sight.see_registry(busy) == (set(), set())
        assert sight.see_registry(self.state(restarts=1))[0] == {"default/m"}

    def test_demand_names_its_model(self) -> None:
        sight = PoolSight()
        sight.see_registry(self.state())
        demand = RegistryState(epoch="e", version=2, demand=[ModelDemand(model="m", queued=1)])
        assert "m" in sight.see_registry(demand)[1]
        assert sight.of("default/m", "m").demand[""].queued == 1

    def test_a_lost_registry_blinds(self) -> None:
        sight = PoolSight()
        sight.see_registry(self.state())
        assert not sight.of("default/m", "m").blind
        assert sight.see_registry(None)[0] == {"default/m"}
        assert sight.of("default/m", "m").blind


class TestNodes:
    GROUPS = (
        {"type": "A10", "gpusPerNode": 4, "maxNodes": 4},
        {"type": "CPU", "gpusPerNode": 0, "maxNodes": 1},
    )

    def test_counts_by_ray_type_and_by_mark(self) -> None:
        nodes = [
            {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A10": 1.0},
            {"CPU": 8.0, "GPU": 4.0, "accelerator:A10": 1000.0},
            {"CPU": 8.0},
            {"CPU": 0.0},
        ]
        assert alive_by_group(pool(*self.GROUPS), nodes) == {"A10": 2, "CPU": 1}

    def test_view_has_living_nodes_and_what_may_come(self) -> None:
        view = observed_view(pool(*self.GROUPS), {"A10": 3}, frozenset({"A10"}))
        a10 = view.groups[0]
        assert (a10.nodes[0].count, a10.obtainable_nodes, a10.pending_too_long) == (3, 1, True)
        assert node_template(pool(*self.GROUPS).spec.accelerators[0]).gpus == (1.0,) * 4

    def test_rows(self) -> None:
        rows = rows_of(pool(*self.GROUPS), {"A10": 1, "CPU": 1}, {"A10": 3.0})
        assert (rows[0].total, rows[0].used, rows[0].free, rows[0].obtainable) == (4, 3, 1, 12)
        assert free_column(rows) == "A10 13/16, CPU 1/1"


class TestRayCluster:
    MADE = pool(
        {
            "type": "A10",
            "gpusPerNode": 1,
            "minNodes": 1,
            "maxNodes": 4,
            "cpusPerNode": "7",
            "memoryPerNode": "28Gi",
        },
        {"type": "CPU", "gpusPerNode": 0, "maxNodes": 2},
        cluster={
            "gcsFaultTolerance": {"redisAddress": "redis:6379", "password": {"name": "redis", "key": "p"}},
            "envFromSecrets": ["hub"], "modelClaims": ["models"], "images": {"vLLM": "r/vllm:{version}"},
        },
    )  # fmt: skip

    def build(self, running: dict[str, Any] | None = None) -> dict[str, Any]:
        spec = self.MADE.spec.ray.cluster
        assert spec is not None
        return ray_cluster(self.MADE, engine_images(spec, "head:1", "vllm:1", "sglang:1"), running)

    def test_a_group_for_each_accelerator_and_image(self) -> None:
        groups = {g["groupName"]: g for g in self.build()["spec"]["workerGroupSpecs"]}
        assert set(groups) == {"a10-vllm", "a10-sglang", "cpu-vllm", "cpu-simulator"}
        a10 = groups["a10-vllm"]
        assert (a10["minReplicas"], a10["maxReplicas"]) == (1, 4)
        marks = json.loads(json.loads(a10["rayStartParams"]["resources"]))
        assert marks == {"accelerator:A10": 1000, "engine:vllm": 1000}
        pod = a10["template"]["spec"]
        container = pod["containers"][0]
        assert container["image"].startswith("r/vllm:")
        assert "{" not in container["image"]
        assert container["resources"]["limits"] == {"memory": "28Gi", "nvidia.com/gpu": "1"}
        assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
        assert {"name": "models-0", "mountPath": "/mnt/models/models", "readOnly": True} in container[
            "volumeMounts"
        ]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert "nvidia.com/gpu" not in json.dumps(groups["cpu-vllm"])

    def test_token_and_fault_tolerance(self) -> None:
        spec = self.build()["spec"]
        assert spec["authOptions"] == {"mode": "token", "secretName": "p-ray-token"}
        assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
        secret = spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": "redis", "key": "p"}

    def test_the_autoscalers_number_is_kept_within_the_bounds(self) -> None:
        running = self.build()
        running["spec"]["workerGroupSpecs"][0]["replicas"] = 3
        running["spec"]["workerGroupSpecs"][0]["scaleStrategy"] = {"workersToDelete": ["w"]}
        again = self.build(running)
        assert again["spec"]["workerGroupSpecs"][0]["replicas"] == 3
        assert again["spec"]["workerGroupSpecs"][0]["scaleStrategy"] == {"workersToDelete": ["w"]}
        assert not differs(again, running)
        running["spec"]["workerGroupSpecs"][0]["replicas"] = 9
        assert self.build(running)["spec"]["workerGroupSpecs"][0]["replicas"] == 4

    def test_only_fields_of_ours_differ(self) -> None:
        wanted = self.build()
        actual = json.loads(json.dumps(wanted))
        actual["metadata"]["annotations"]["theirs"] = "x"
        actual["spec"]["suspend"] = False
        assert not differs(wanted, actual)
        actual["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 99
        assert differs(wanted, actual)

    def test_a_field_that_is_no_longer_wanted_differs(self) -> None:
        running = self.build()
        spec = self.MADE.spec.ray.cluster
        assert spec is not None
        without: tuple[dict[str, Any], ...] = ({"env_from_secrets": []}, {"gcs_fault_tolerance": None})
        for gone in without:
            ray = self.MADE.spec.ray.model_copy(update={"cluster": spec.model_copy(update=gone)})
            pool = self.MADE.model_copy(update={"spec": self.MADE.spec.model_copy(update={"ray": ray})})
            images = engine_images(spec, "head:1", "vllm:1", "sglang:1")
            assert differs(ray_cluster(pool, images, running), running), gone


class TestPending:
    def test_late_after_the_limit_and_forgiven_later(self) -> None:
        tracker = PendingTracker(10.0)
        waiting = {"default/m/a": "A10"}
        assert tracker.late(waiting, 0.0) == frozenset()
        assert tracker.late(waiting, 9.0) == frozenset()
        assert tracker.late(waiting, 10.0) == {"A10"}
        assert tracker.late({}, 20.0) == {"A10"}
        assert tracker.late({}, 51.0) == frozenset()

    def test_when_the_next_one_is_late(self) -> None:
        tracker = PendingTracker(10.0)
        assert tracker.next_late() is None
        tracker.note({"a": "A10", "b": "A10"}, 1.0)
        tracker.note({"a": "A10", "b": "A10", "c": "T4"}, 3.0)
        assert tracker.next_late() == 11.0
        assert tracker.late({"a": "A10", "c": "T4"}, 11.0) == {"A10"}
        assert tracker.next_late() == 13.0  # what is late already is nothing to wait for
        tracker.note({"a": "A10"}, 12.0)
        assert tracker.next_late() is None
        tracker.late({"a": "A10"}, 51.0)  # forgiven, and still not there
        assert tracker.next_late() == 11.0

    def test_a_variant_that_got_its_place_starts_anew(self) -> None:
        tracker = PendingTracker(10.0)
        tracker.late({"k": "A10"}, 0.0)
        tracker.late({}, 5.0)
        assert tracker.late({"k": "A10"}, 12.0) == frozenset()


def condition(kind: str, status: str) -> Condition:
    return Condition.model_validate(
        {"type": kind, "status": status, "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": "R"}
    )


@pytest.mark.parametrize(
    ("kind", "before", "after", "told"),
    [
        ("Ready", "Unknown", "False", False),
        ("Ready", "False", "True", True),
        ("Ready", "True", "True", False),
        ("Serving", "True", "False", True),
        ("Accepted", "Unknown", "False", True),
        ("Fits", "True", "Unknown", False),
        ("Progressing", "False", "True", False),
        ("Serving", "False", "True", False),
        ("Accepted", "False", "True", True),
    ],
)
def test_events_tell_what_people_want_to_know(kind: str, before: str, after: str, told: bool) -> None:
    found = list(turned([condition(kind, before)], [condition(kind, after)]))
    assert bool(found) is told


def test_a_pause_that_is_meant_is_no_warning() -> None:
    """Serving ends with a word of it, and coming back begins without a complaint."""
    held = condition("Ready", "True").model_copy(update={"reason": "Suspended"})
    off = condition("Serving", "False").model_copy(update={"reason": "Suspended"})
    turning = condition("Suspended", "True").model_copy(update={"reason": "Suspended"})
    before = [condition("Serving", "True"), condition("Suspended", "False"), condition("Ready", "True")]
    (told,) = turned(before, [off, turning, held])
    assert (told.type, event_type(told)) == ("Serving", "Normal")
    starting = condition("Ready", "False").model_copy(update={"reason": "Deploying"})
    assert not list(turned([off, turning, held], [condition("Suspended", "False"), starting]))


class TestSettings:
    def test_of_the_environment(self) -> None:
        found = Settings.from_environment(
            {
                "MODELFLEET_WATCH_NAMESPACES": "a, b",
                "MODELFLEET_LISTEN": "127.0.0.1:1",
                "MODELFLEET_LEADER_ELECTION": "no",
            }
        )
        assert (found.watch_namespaces, found.listen, found.leader_election) == (
            ("a", "b"),
            ("127.0.0.1", 1),
            False,
        )

    @pytest.mark.parametrize(
        ("name", "value"),
        [("LISTEN", "8080"), ("LEASE_SECONDS", "1"), ("RESYNC_SECONDS", "x"), ("LEADER_ELECTION", "?")],
    )
    def test_names_the_variable_that_is_wrong(self, name: str, value: str) -> None:
        with pytest.raises(SettingsError, match=f"MODELFLEET_{name}"):
            Settings.from_environment({f"MODELFLEET_{name}": value})


def test_nothing_observed_is_blind_to_nothing() -> None:
    assert not Observed().revisions("a")


def test_what_never_worked_is_told_when_it_fails_and_not_again() -> None:
    def found(before: str, after: str, status: str = "False") -> list[str]:
        old = [condition("Ready", "False").model_copy(update={"reason": before})]
        new = [condition("Ready", status).model_copy(update={"reason": after})]
        return [c.reason for c in turned(old, [*new, condition("Fits", "True")])]

    assert found("Deploying", "Starting") == []
    assert found("Starting", "OutOfMemory") == ["OutOfMemory"]
    assert found("OutOfMemory", "OutOfMemory") == []
    assert found("OutOfMemory", "AllVariantsReady", "True") == ["AllVariantsReady"]
    refused = condition("Fits", "False")
    assert [c.type for c in turned([], [condition("Ready", "False"), refused])] == ["Fits"]


def test_a_pool_says_what_its_catalogue_lacks() -> None:
    found = accepted_pool(pool({"type": "A10"}, {"type": "RTX4090"}, {"type": "a100-80g"}))
    assert found.status == "True"
    assert "no RTX4090, a100-80g: only the simulator" in found.message
    assert accepted_pool(pool({"type": "A10"})).message == "1 accelerator groups"
