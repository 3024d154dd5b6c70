"""All ModelDeployments and ServingPools that the operator has seen, and who works on them.

Events only say that something may have changed; what follows is worked out from what is known now. Nothing is
remembered that the API, Ray and the registry don't hold: a restart begins with a list of everything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelfleet_operator.api import (
    FINALIZER,
    InvalidResourcesError,
    ModelDeployment,
    ServingPool,
    parse_object,
)
from modelfleet_operator.clients.errors import ClientError
from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, SERVING_POOL, Kind, Object
from modelfleet_operator.departure import leave
from modelfleet_operator.metrics import CONDITIONS, ERRORS
from modelfleet_operator.pool_access import dashboard_of
from modelfleet_operator.pools import PoolRunner, Tools
from modelfleet_operator.reconcile.claims import Claims
from modelfleet_operator.reconcile.moving import is_ready, said_while_moving
from modelfleet_operator.reports import Report
from modelfleet_operator.seen import SeenDeployment, SeenPool, address_of, is_same, is_stale, key_of
from modelfleet_operator.statuses import (
    refuse_deployment,
    refuse_pool,
    set_deployment_status,
    set_first_status,
)

log = logging.getLogger(__name__)


@dataclass
class Fleet:
    """Everything that the operator works on.

    Attributes:
        tools: clients and settings.
    """

    tools: Tools
    heartbeat: float = field(default_factory=time.monotonic)
    """Monotonic time of the last sign of the resync loop: liveness."""
    synced: bool = False
    """Whether everything has been listed once."""
    _deployments: dict[str, SeenDeployment] = field(default_factory=dict)
    _pools: dict[str, SeenPool] = field(default_factory=dict)
    _claims: dict[str, Claims] = field(default_factory=dict)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    # --- Lists ---

    async def sync(self) -> None:
        """List everything: what events may have missed is seen, what is gone is forgotten.

        Raises:
            ClientError: the API server can't be reached.
        """
        began = time.monotonic()
        pools, deployments = await self._list(SERVING_POOL), await self._list(MODEL_DEPLOYMENT)
        for body in pools:
            self._guarded(self._take_pool, body, began)
        for body in deployments:
            self._guarded(self._take_deployment, body, began)
        # Before any pool starts: it removes what it does not know. What was seen since may be newer.
        listed = {key_of(body) for body in deployments}
        for key, entry in list(self._deployments.items()):
            if key not in listed and entry.at < began:
                self._forget_deployment(key)
        listed = {key_of(body) for body in pools}
        for key, pool in list(self._pools.items()):
            if key not in listed and pool.at < began:
                self._forget_pool(key)
        self.synced = True
        for pool in self._pools.values():
            self._start(pool)

    def _guarded(self, take: Callable[[Object, float], None], body: Object, began: float) -> None:
        """Take a listed object in; a fault that it brings to light must not end the work on all others."""
        try:
            take(body, began)
        except Exception:
            ERRORS.labels(reason="InternalError").inc()
            log.exception("%s %s can't be taken in", body["kind"], key_of(body))

    async def _list(self, kind: Kind) -> list[Object]:
        namespaces: Sequence[str | None] = self.tools.settings.watch_namespaces or (None,)
        found = [await self.tools.kube.list(kind, namespace) for namespace in namespaces]
        return [body for page in found for body in page]

    async def run(self) -> None:
        """List everything now and then, and count conditions, until cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self.tools.settings.resync_seconds
        while True:
            await asyncio.sleep(5.0)
            self.heartbeat = time.monotonic()
            for runner in self.runners:
                if runner.failed is not None:
                    raise runner.failed
            self._follow_moves()
            self._count_conditions()
            if loop.time() < due:
                continue
            due = loop.time() + self.tools.settings.resync_seconds
            try:
                await self.sync()
            except ClientError as error:  # what is known goes on; the watches tell what changes
                ERRORS.labels(reason="ApiServer").inc()
                log.warning("resync: %s", error)

    async def close(self) -> None:
        """Stop all work; everything that runs in Ray goes on."""
        for pool in self._pools.values():
            if pool.runner is not None:
                await pool.runner.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def runners(self) -> list[PoolRunner]:
        """Pools at work."""
        return [p.runner for p in self._pools.values() if p.runner is not None]

    # --- ModelDeployments ---

    def saw_deployment(self, event: str | None, body: Object) -> None:
        """Take an event about a ModelDeployment in."""
        if event == "DELETED":
            self._forget_deployment(key_of(body), uid=body["metadata"]["uid"])
        else:
            self._take_deployment(body)

    def _take_deployment(self, body: Object, listed: float | None = None) -> None:
        key = key_of(body)
        before = self._deployments.get(key)
        if before is not None and is_stale(body, before, listed):
            return
        if before is not None and before.body["metadata"]["uid"] != body["metadata"]["uid"]:
            self._forget_deployment(key)
            before = None
        authoritative = listed is not None
        self.tools.writer.saw(MODEL_DEPLOYMENT, body, authoritative=authoritative)
        if before is not None and not authoritative and is_same(body, before.body):
            before.take(body)
            return
        entry = before or SeenDeployment(body, None)
        entry.take(body)
        self._deployments[key] = entry
        if entry.deleting:
            self._withdraw(key, entry)
            return
        self._parse_deployment(entry)
        self._place(key, entry)

    def _parse_deployment(self, entry: SeenDeployment) -> None:
        try:
            parsed = parse_object(entry.body)
        except InvalidResourcesError as error:
            # Engines go on as the last valid spec asked for.
            entry.problems = "; ".join(
                f"{p.field}: {p.message}" if p.field else p.message for p in error.problems
            )
            ERRORS.labels(reason="InvalidSpec").inc()
            return
        assert isinstance(parsed, ModelDeployment)  # noqa: S101  watched by kind
        entry.parsed, entry.problems = parsed, ""
        if not entry.body.get("status", {}).get("conditions"):
            set_first_status(self.tools.writer, parsed)

    def _place(self, key: str, entry: SeenDeployment) -> None:
        """Give a ModelDeployment to the pool that it belongs to now."""
        pool = self._pool_of(entry)
        runner = pool.runner if pool else None
        if entry.runner is not None and entry.runner is not runner:
            self._move_out(key, entry, entry.runner)
        if not self.synced:
            self._recall(key, entry, runner)
        if runner is not None:
            entry.former.pop(runner.pool.key, None)
        entry.runner = runner
        if entry.problems:
            if runner is not None:
                runner.hold(key)
            refuse_deployment(self.tools.writer, entry, "InvalidSpec", entry.problems)
        elif runner is None or pool is None:
            self._refuse_without_pool(entry, pool)
        elif entry.parsed is not None:
            claims = self._claims.setdefault(key_of(pool.body), Claims())
            runner.use(key)
            for affected in claims.add(entry.parsed):
                self._accept(affected, runner, claims)

    def _accept(self, key: str, runner: PoolRunner, claims: Claims) -> None:
        """Want a ModelDeployment, unless its names belong to others."""
        entry = self._deployments.get(key)
        if entry is None or entry.parsed is None or entry.runner is not runner or entry.problems:
            return
        conflicts = claims.conflicts(key)
        if not conflicts:
            runner.put(entry.parsed)
            return
        if key in runner.controller.deployments:
            runner.remove(key)
        taken = ", ".join(f"{name} belongs to ModelDeployment {holder}" for name, holder in conflicts.items())
        refuse_deployment(self.tools.writer, entry, "NameConflict", taken)

    def _pool_of(self, entry: SeenDeployment) -> SeenPool | None:
        """The pool of its own namespace, else the platform's."""
        for namespace in dict.fromkeys((entry.namespace, self.tools.settings.namespace)):
            pool = self._pools.get(f"{namespace}/{entry.pool_name}")
            if pool is not None:
                return pool
        return None

    def _take_out(self, key: str, runner: PoolRunner) -> None:
        """Want a ModelDeployment no longer in a pool."""
        runner.remove(key)
        runner.leave(key)
        claims = self._claims.get(runner.pool.key)
        if claims is not None:
            for affected in claims.remove(key):
                self._accept(affected, runner, claims)
        self._release_unused(self._pools.get(runner.pool.key))

    def _forget_deployment(self, key: str, uid: str | None = None) -> None:
        entry = self._deployments.get(key)
        if entry is None or (uid is not None and entry.body["metadata"]["uid"] != uid):
            return
        del self._deployments[key]
        for runner in _runners_of(entry):
            self._take_out(key, runner)
        entry.gone.set()
        self.tools.writer.forget(address_of(MODEL_DEPLOYMENT, key))

    # --- Moves from pool to pool ---

    def _move_out(self, key: str, entry: SeenDeployment, old: PoolRunner) -> None:
        """Leave a pool: at once where clients would miss nothing, else when the next pool serves."""
        entry.told = None
        at_once = entry.parsed is not None and entry.parsed.spec.rollout.strategy == "Recreate"
        if at_once or old.controller.serves(key) is False:
            self._take_out(key, old)
        else:
            entry.former[old.pool.key] = old

    def _recall(self, key: str, entry: SeenDeployment, runner: PoolRunner | None) -> None:
        """Go on with a move that was under way when the operator ended: the pool before stays as it is."""
        before = self._pools.get(entry.served_by)
        if before is None or before.runner is None or before.runner is runner:
            return
        before.runner.hold(key)
        entry.former[entry.served_by] = before.runner

    def _end_move(self, key: str, entry: SeenDeployment) -> None:
        """Let pools drain that are not needed any more: the new one serves, or they do no longer."""
        if entry.runner is None:
            return  # there is no next pool yet
        arrived = entry.told is not None and is_ready(entry.told.findings)
        for name, old in list(entry.former.items()):
            if arrived or old.controller.serves(key) is False:
                del entry.former[name]
                self._take_out(key, old)

    def _follow_moves(self) -> None:
        """Look whether pools before still serve: one that only holds what runs reports nothing of it."""
        for key, entry in list(self._deployments.items()):
            if entry.former and not entry.problems and not entry.deleting:
                self._end_move(key, entry)
                self._tell(key, entry)

    # --- Statuses of ModelDeployments ---

    def report(self, runner: PoolRunner, reports: list[Report]) -> None:
        """Write down what a pool's controller says of its ModelDeployments."""
        for report in reports:
            key = report.deployment.key
            entry = self._deployments.get(key)
            if entry is None or entry.problems:
                continue
            if runner is entry.runner:
                entry.told = report
            elif runner.pool.key not in entry.former:
                continue
            self._end_move(key, entry)
            self._tell(key, entry)

    def _tell(self, key: str, entry: SeenDeployment) -> None:
        report, runner = entry.told, entry.runner
        if report is None or runner is None:
            return
        findings, serving = report.findings, runner.pool.key
        if entry.former:
            serving = next(iter(entry.former))
            answers = {name: old.controller.serves(key) for name, old in entry.former.items()}
            findings = said_while_moving(findings, answers, runner.pool.key)
        rows = report.decision.variants if report.decision else ()
        set_deployment_status(self.tools.writer, report.deployment, rows, findings, serving)

    def _refuse_without_pool(self, entry: SeenDeployment, pool: SeenPool | None) -> None:
        if pool is not None:
            problems = f"ServingPool {key_of(pool.body)}: {pool.problems}"
            refuse_deployment(self.tools.writer, entry, "PoolNotAccepted", problems)
            return
        where = " or ".join(dict.fromkeys((entry.namespace, self.tools.settings.namespace)))
        missing = f"no ServingPool {entry.pool_name} in {where}"
        if entry.former:
            missing += f"; what runs in {', '.join(entry.former)} goes on"
        refuse_deployment(self.tools.writer, entry, "PoolNotFound", missing)

    # --- Deletion of ModelDeployments ---

    def _withdraw(self, key: str, entry: SeenDeployment) -> None:
        """Begin to let a ModelDeployment go: its route first, then its applications, which drain."""
        if FINALIZER not in entry.body["metadata"].get("finalizers", ()) or entry.leaving is not None:
            return
        pool = self._pool_of(entry)
        if entry.runner is None and pool is not None:
            entry.runner = pool.runner
        if not self.synced:
            self._recall(key, entry, entry.runner)
        if entry.runner is None and entry.former:
            entry.runner = entry.former.pop(next(iter(entry.former)))
        for runner in _runners_of(entry):
            runner.use(key)  # the pool stays until nothing of it runs there
            runner.remove(key)
            entry.draining.add(runner.pool.key)
            claims = self._claims.get(runner.pool.key)
            for affected in claims.remove(key) if claims is not None else ():
                assert claims is not None  # noqa: S101  see the loop
                self._accept(affected, runner, claims)
        entry.leaving = self._spawn(leave(key, entry, self.tools, lambda: self.runners), f"leave {key}")

    def on_gone(self, runner: PoolRunner, key: str) -> None:
        """Nothing of a removed ModelDeployment is left in a pool."""
        entry = self._deployments.get(key)
        if entry is None or entry.leaving is None:
            return
        entry.draining.discard(runner.pool.key)
        if runner is not entry.runner:
            runner.leave(key)
            self._release_unused(self._pools.get(runner.pool.key))
        if not entry.draining:
            entry.gone.set()

    # --- ServingPools ---

    def saw_pool(self, event: str | None, body: Object) -> None:
        """Take an event about a ServingPool in."""
        if event == "DELETED":
            pool = self._pools.get(key_of(body))
            if pool is not None and pool.body["metadata"]["uid"] == body["metadata"]["uid"]:
                self._forget_pool(key_of(body))
        else:
            self._take_pool(body)

    def _take_pool(self, body: Object, listed: float | None = None) -> None:
        key = key_of(body)
        before = self._pools.get(key)
        if before is not None and is_stale(body, before, listed):
            return
        if before is not None and before.body["metadata"]["uid"] != body["metadata"]["uid"]:
            self._forget_pool(key)
            before = None
        authoritative = listed is not None
        self.tools.writer.saw(SERVING_POOL, body, authoritative=authoritative)
        if before is not None and not authoritative and is_same(body, before.body):
            before.take(body)
            return
        pool = before or SeenPool(body, None)
        pool.take(body)
        self._pools[key] = pool
        self._parse_pool(pool)
        self._connect(key, pool)
        self._release_unused(pool)

    def _parse_pool(self, pool: SeenPool) -> None:
        pool.problems = ""
        try:
            parsed = parse_object(pool.body)
        except InvalidResourcesError as error:
            pool.problems = "; ".join(f"{p.field}: {p.message}" for p in error.problems)
            return
        assert isinstance(parsed, ServingPool)  # noqa: S101  watched by kind
        pool.parsed = parsed

    def _connect(self, key: str, pool: SeenPool) -> None:
        """Have a runner that works as the pool asks; none for a pool that can't be accepted."""
        if pool.problems or pool.parsed is None:
            refuse_pool(self.tools.writer, pool, "InvalidSpec", pool.problems)
            return
        rival = self._same_cluster(key, pool.parsed)
        if rival is not None:
            pool.problems = f"ServingPool {rival} has the same Ray cluster: one pool speaks for a cluster"
            self._disconnect(pool)
            refuse_pool(self.tools.writer, pool, "ClusterInUse", pool.problems)
            self._place_all(key)
            return
        if pool.runner is not None and pool.runner.set_pool(pool.parsed):
            return
        self._disconnect(pool)
        pool.runner = PoolRunner(pool.parsed, self.tools, self.report, self.on_gone)
        self._place_all(key)
        if self.synced:
            self._start(pool)

    def _same_cluster(self, key: str, pool: ServingPool) -> str | None:
        """An older pool with the same address: the two would remove each other's applications."""
        address = dashboard_of(pool)
        rivals = [
            other.parsed
            for name, other in self._pools.items()
            if name != key and other.parsed and dashboard_of(other.parsed) == address
        ]
        older = [r for r in rivals if _seniority(r) < _seniority(pool)]
        return min(older, key=_seniority).key if older else None

    def _start(self, pool: SeenPool) -> None:
        if pool.runner is not None and not pool.runner.started:
            pool.runner.start()

    def _disconnect(self, pool: SeenPool) -> None:
        runner, pool.runner = pool.runner, None
        if runner is not None:
            self._claims.pop(runner.pool.key, None)
            for entry in self._deployments.values():
                if entry.runner is runner:
                    entry.runner = None
                entry.former.pop(runner.pool.key, None)
                entry.draining.discard(runner.pool.key)
            self._spawn(runner.stop(), f"stop {runner.pool.key}")

    def _place_all(self, key: str) -> None:
        """Look again where the ModelDeployments belong that may be this pool's."""
        name = key.partition("/")[2]
        for other, entry in list(self._deployments.items()):
            if entry.pool_name == name and not entry.deleting:
                self._place(other, entry)

    def _forget_pool(self, key: str) -> None:
        pool = self._pools.pop(key, None)
        if pool is None:
            return
        self._disconnect(pool)
        self.tools.writer.forget(address_of(SERVING_POOL, key))
        self._place_all(key)
        # One that had to stand back for it may come forward.
        for other, waiting in list(self._pools.items()):
            if waiting.runner is None:
                self._parse_pool(waiting)
                self._connect(other, waiting)

    def _release_unused(self, pool: SeenPool | None) -> None:
        """Let a pool go that is being deleted and that nobody uses."""
        if pool is None or not pool.deleting or pool.releasing is not None:
            return
        if pool.runner is None or not pool.runner.users:
            address = address_of(SERVING_POOL, key_of(pool.body))
            pool.releasing = self._spawn(self.tools.writer.release(address), f"release {key_of(pool.body)}")

    # --- Odds and ends ---

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _count_conditions(self) -> None:
        CONDITIONS.clear()
        for kind, keys in ((MODEL_DEPLOYMENT, self._deployments), (SERVING_POOL, self._pools)):
            for key in keys:
                for condition in self.tools.writer.status_of(address_of(kind, key)).get("conditions", ()):
                    CONDITIONS.labels(kind.kind, condition["type"], condition["status"]).inc()


def _runners_of(entry: SeenDeployment) -> list[PoolRunner]:
    """Pools at work that something of a ModelDeployment runs in."""
    return [*([entry.runner] if entry.runner else []), *entry.former.values()]


def _seniority(pool: ServingPool) -> tuple[str, str]:
    return (pool.metadata.creation_timestamp or "", pool.key)
