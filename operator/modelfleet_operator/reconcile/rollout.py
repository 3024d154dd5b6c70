"""How a new revision of a variant takes the place of the old one.

A revision is an application of its own, so a rollout is: start the new one, let both take traffic once it
is ready, then leave the old one out. Removing an application is what drains it: its replicas tell the
registry, wait until no router sends them anything, and end when their last request has. Every step follows
from what is seen now; nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from modelfleet_operator.reconcile.applications import Application, args_of, running_config_of
from modelfleet_operator.reconcile.observed import Revision

ROUTED = 100


@dataclass(frozen=True)
class VariantRollout:
    """What shall run of a variant now, and which of it takes requests."""

    applications: tuple[Application, ...] = ()
    revisions: Mapping[str, int] = field(default_factory=dict)
    progressing: bool = False


def roll_out(
    wanted: Application | None,
    running: Mapping[str, Revision],
    *,
    surge: bool,
    blind: bool,
) -> VariantRollout:
    """The next step.

    Args:
        wanted: the application that shall run in the end; ``None`` when nothing can be planned: then what
            runs goes on.
        running: revisions that are seen.
        surge: start the new revision beside the old one; otherwise after it.
        blind: endpoints can't be seen: nothing is removed.
    """
    kept = {revision: app for revision, seen in running.items() if (app := _as_it_runs(seen))}
    if wanted is None:
        return VariantRollout(tuple(kept.values()), dict.fromkeys(kept, ROUTED))
    mine = wanted.args.revision
    ready = running[mine].ready if mine in running else 0
    wanted = _with_running_args(wanted, running.get(mine))
    if not surge and mine not in kept and any(r != mine and seen.application for r, seen in running.items()):
        # The old one gives its accelerators back first; once it has drained, the next step goes on.
        return VariantRollout(progressing=True)
    others = {revision: app for revision, app in kept.items() if revision != mine} if surge else {}
    if not blind:
        done = ready >= wanted.replicas
        others = (
            {} if done else {revision: app for revision, app in others.items() if running[revision].ready}
        )
    applications = (wanted, *others.values()) if wanted.replicas else ()
    return VariantRollout(
        applications,
        dict.fromkeys([mine, *others], ROUTED),
        progressing=bool(others) or ready < wanted.replicas,
    )


def _as_it_runs(seen: Revision) -> Application | None:
    if seen.application is None or seen.application.deleting:
        return None
    args = args_of(seen.application)
    return Application(args, _replicas(seen), running_config_of(seen.application)) if args else None


def _with_running_args(wanted: Application, seen: Revision | None) -> Application:
    """Same revision, same engine: arguments that only the release or the plan's numbers changed wait."""
    running = _as_it_runs(seen) if seen else None
    if running is None:
        return wanted
    args = msgspec.structs.replace(running.args, registry=wanted.args.registry)
    return Application(args, wanted.replicas, wanted.running_config)


def _replicas(seen: Revision) -> int:
    deployments = (seen.application.config.get("deployments") if seen.application else None) or [{}]
    replicas = deployments[0].get("num_replicas")
    return replicas if isinstance(replicas, int) and replicas > 0 else 1
