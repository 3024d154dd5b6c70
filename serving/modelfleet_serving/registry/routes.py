"""The routes that the operator wrote: who owns which model name. Pure."""

from __future__ import annotations

from modelfleet_serving.contract import Endpoint, ModelRoute, RouteSpec, VariantRoute
from modelfleet_serving.registry.keys import DeploymentKey


class RouteConflictError(Exception):
    """A model or adapter name belongs to another ModelDeployment."""


class InvalidRouteError(ValueError):
    """A route that contradicts itself."""


class Routes:
    """Routes by ModelDeployment. The first that asks for a name keeps it."""

    def __init__(self) -> None:
        self._specs: dict[DeploymentKey, RouteSpec] = {}
        self._owners: dict[str, DeploymentKey] = {}

    def __len__(self) -> int:
        return len(self._specs)

    def get(self, key: DeploymentKey) -> RouteSpec | None:
        """The route of a ModelDeployment."""
        return self._specs.get(key)

    def digests(self) -> dict[str, str]:
        """Digest of each route by ``namespace/name``."""
        return {f"{namespace}/{name}": spec.digest() for (namespace, name), spec in self._specs.items()}

    def put(self, spec: RouteSpec) -> bool:
        """Set a route; whether that is a change.

        Raises:
            InvalidRouteError: it asks for a name twice or weighs what it doesn't have.
            RouteConflictError: a name is another's.
        """
        key = (spec.namespace, spec.deployment)
        names = _names(spec)
        for name in names:
            owner = self._owners.get(name, key)
            if owner != key:
                raise RouteConflictError(f"model name {name!r} belongs to ModelDeployment {'/'.join(owner)}")
        before = self._specs.get(key)
        if before == spec:
            return False
        if before is not None:
            self._release(key, before)
        self._specs[key] = spec
        self._owners.update(dict.fromkeys(names, key))
        return True

    def delete(self, key: DeploymentKey) -> bool:
        """Withdraw a route; whether there was one."""
        spec = self._specs.pop(key, None)
        if spec is None:
            return False
        self._release(key, spec)
        return True

    def _release(self, key: DeploymentKey, spec: RouteSpec) -> None:
        for name in (spec.name, *spec.adapters):
            if self._owners.get(name) == key:
                del self._owners[name]


def model_route(spec: RouteSpec, endpoints: dict[tuple[str, str], list[Endpoint]]) -> ModelRoute:
    """A route with the endpoints of those revisions that have a weight."""
    variants = []
    for variant in spec.variants:
        weights = {revision: weight for revision, weight in variant.revisions.items() if weight > 0}
        variants.append(
            VariantRoute(
                name=variant.name,
                endpoints=[e for revision in weights for e in endpoints.get((variant.name, revision), ())],
                # One revision takes everything, however much it weighs.
                revision_weights=weights if len(weights) > 1 else {},
            )
        )
    return ModelRoute(
        name=spec.name,
        namespace=spec.namespace,
        weights=spec.weights,
        fallback=spec.fallback,
        affinity=spec.affinity,
        queue=spec.queue,
        variants=variants,
        task=spec.task,
        adapters=spec.adapters,
        suspended=spec.suspended,
    )


def _names(spec: RouteSpec) -> list[str]:
    """All model names of a route.

    Raises:
        InvalidRouteError: a name stands there twice, is empty, or is of no variant.
    """
    names = [spec.name, *spec.adapters]
    if not all(names) or len(set(names)) != len(names):
        raise InvalidRouteError(f"model and adapter names must differ and not be empty: {', '.join(names)}")
    variants = [variant.name for variant in spec.variants]
    if len(set(variants)) != len(variants):
        raise InvalidRouteError(f"variant names must differ: {', '.join(variants)}")
    if unknown := [name for name in (*spec.weights, *spec.fallback) if name not in variants]:
        raise InvalidRouteError(f"no variants of {spec.name!r}: {', '.join(unknown)}")
    if min((*spec.weights.values(), *(w for v in spec.variants for w in v.revisions.values()), 0)) < 0:
        raise InvalidRouteError("a weight is below 0")
    return names
