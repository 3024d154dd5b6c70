"""All ModelDeployments that were seen: each is given to its pool, moved, told about, and let go.

The way of one: :meth:`Deployments.take` (an event or a list has it), ``_parse``, ``_place`` (which pool,
whose name), then its :class:`.pools.PoolRunner`; what that finds comes back through
:meth:`Deployments.report`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from modelfleet_operator.api import FINALIZER, InvalidResourcesError, ModelDeployment, parse_object
from modelfleet_operator.clients.kube import MODEL_DEPLOYMENT, Object
from modelfleet_operator.departure import leave
from modelfleet_operator.metrics import ERRORS
from modelfleet_operator.pools import PoolRunner, Tools
from modelfleet_operator.reconcile.claims import Claims
from modelfleet_operator.reconcile.moving import is_ready, said_while_moving
from modelfleet_operator.reports import Report
from modelfleet_operator.seen import SeenDeployment, SeenPool, address_of, is_same, is_stale, key_of
from modelfleet_operator.serving_pools import ServingPools, Spawn
from modelfleet_operator.statuses import refuse_deployment, set_deployment_status, set_first_status


@dataclass
class Deployments:
    """ModelDeployments by ``namespace/name``.

    Attributes:
        tools: clients and settings.
        pools: that they may belong to.
        spawn: starts work in the background.
    """

    tools: Tools
    pools: ServingPools
    spawn: Spawn
    seen: dict[str, SeenDeployment] = field(default_factory=dict)
    _claims: dict[str, Claims] = field(default_factory=dict)
    """Who claims which name, by pool."""

    def saw(self, event: str | None, body: Object) -> None:
        """Take an event about a ModelDeployment in."""
        if event == "DELETED":
            self.forget(key_of(body), uid=body["metadata"]["uid"])
        else:
            self.take(body)

    def take(self, body: Object, listed: float | None = None) -> None:
        """Take a ModelDeployment in.

        Args:
            body: the object.
            listed: monotonic time at which the list began that has it; ``None`` for an event.
        """
        key = key_of(body)
        before = self.seen.get(key)
        if before is not None and is_stale(body, before, listed):
            return
        if before is not None and before.body["metadata"]["uid"] != body["metadata"]["uid"]:
            self.forget(key)
            before = None
        authoritative = listed is not None
        self.tools.writer.saw(MODEL_DEPLOYMENT, body, authoritative=authoritative)
        if before is not None and not authoritative and is_same(body, before.body):
            before.take(body)
            return
        entry = before or SeenDeployment(body, None)
        entry.take(body)
        self.seen[key] = entry
        if entry.deleting:
            self._withdraw(key, entry)
            return
        self._parse(entry)
        self._place(key, entry)

    def _parse(self, entry: SeenDeployment) -> None:
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
        if not self.pools.working:
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
        entry = self.seen.get(key)
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
            pool = self.pools.get(f"{namespace}/{entry.pool_name}")
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
        self.pools.release_unused(runner.pool.key)

    def forget(self, key: str, uid: str | None = None) -> None:
        """A ModelDeployment is gone, the one with this uid, if one is given."""
        entry = self.seen.get(key)
        if entry is None or (uid is not None and entry.body["metadata"]["uid"] != uid):
            return
        del self.seen[key]
        for runner in _runners_of(entry):
            self._take_out(key, runner)
        entry.gone.set()
        self.tools.writer.forget(address_of(MODEL_DEPLOYMENT, key))

    # --- Pools come, change and go ---

    def place_all(self, key: str) -> None:
        """Look again where the ModelDeployments belong that may be this pool's."""
        name = key.partition("/")[2]
        for other, entry in list(self.seen.items()):
            if entry.pool_name == name and not entry.deleting:
                self._place(other, entry)

    def disconnected(self, runner: PoolRunner) -> None:
        """A pool is worked on no longer, or by another runner."""
        self._claims.pop(runner.pool.key, None)
        for entry in self.seen.values():
            if entry.runner is runner:
                entry.runner = None
            entry.former.pop(runner.pool.key, None)
            entry.draining.discard(runner.pool.key)

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
        before = self.pools.get(entry.served_by)
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

    def follow_moves(self) -> None:
        """Look whether pools before still serve: one that only holds what runs reports nothing of it."""
        for key, entry in list(self.seen.items()):
            if entry.former and not entry.problems and not entry.deleting:
                self._end_move(key, entry)
                self._tell(key, entry)

    # --- Statuses ---

    def report(self, runner: PoolRunner, reports: list[Report]) -> None:
        """Write down what a pool's controller says of its ModelDeployments."""
        for report in reports:
            key = report.deployment.key
            entry = self.seen.get(key)
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

    # --- Deletion ---

    def _withdraw(self, key: str, entry: SeenDeployment) -> None:
        """Begin to let a ModelDeployment go: its route first, then its applications, which drain."""
        if FINALIZER not in entry.body["metadata"].get("finalizers", ()) or entry.leaving is not None:
            return
        pool = self._pool_of(entry)
        if entry.runner is None and pool is not None:
            entry.runner = pool.runner
        if not self.pools.working:
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
        entry.leaving = self.spawn(leave(key, entry, self.tools, lambda: self.pools.runners), f"leave {key}")

    def on_gone(self, runner: PoolRunner, key: str) -> None:
        """Nothing of a removed ModelDeployment is left in a pool."""
        entry = self.seen.get(key)
        if entry is None or entry.leaving is None:
            return
        entry.draining.discard(runner.pool.key)
        if runner is not entry.runner:
            runner.leave(key)
            self.pools.release_unused(runner.pool.key)
        if not entry.draining:
            entry.gone.set()


def _runners_of(entry: SeenDeployment) -> list[PoolRunner]:
    """Pools at work that something of a ModelDeployment runs in."""
    return [*([entry.runner] if entry.runner else []), *entry.former.values()]
