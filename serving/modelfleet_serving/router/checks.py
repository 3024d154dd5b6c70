"""Checks route tables before they are used: every fault at once, each with its place."""

from __future__ import annotations

import re
from typing import Final

from modelfleet_serving.contract import EndpointState, ModelRoute, VariantRoute
from modelfleet_serving.router.table import TableError, parse_endpoint_url

_UNSAFE: Final = re.compile(r"[^\x20-\x7e]")


class TableCheck:
    """Finds what is wrong in a table whose models are shown one after the other."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._index = 0

    def faults(self, model: ModelRoute) -> list[str]:
        """Everything wrong in the next model, one line a fault, with its place."""
        faults: list[str] = []
        place = f"models[{self._index}]"
        self._index += 1
        if not model.name or _UNSAFE.search(model.name):
            faults.append(f"{place}.name: {model.name!a} must be printable ASCII")
        if model.name in self._seen:
            faults.append(f"{place}.name: {model.name!a} occurs twice")
        self._seen.add(model.name)
        return faults + _check_variants(place, model)


def _check_variants(place: str, model: ModelRoute) -> list[str]:
    faults: list[str] = []
    names = [variant.name for variant in model.variants]
    shown = ", ".join(map(ascii, names))
    if len(set(names)) != len(names):
        faults.append(f"{place}.variants: a name occurs twice: {shown}")
    for field, listed in (("weights", model.weights), ("fallback", model.fallback)):
        faults += [
            f"{place}.{field}: {name!a} is no variant of {model.name!a} ({shown})"
            for name in listed
            if name not in names
        ]
    faults += [
        f"{place}.weights.{name!a}: {weight} is below 0"
        for name, weight in model.weights.items()
        if weight < 0
    ]
    for number, variant in enumerate(model.variants):
        faults += _check_endpoints(f"{place}.variants[{number}]", variant)
    return faults


def _check_endpoints(where: str, variant: VariantRoute) -> list[str]:
    faults: list[str] = []
    if not variant.name or _UNSAFE.search(variant.name):
        faults.append(f"{where}.name: {variant.name!a} must be printable ASCII")
    for position, endpoint in enumerate(variant.endpoints):
        if _UNSAFE.search(endpoint.id) or not endpoint.id:
            faults.append(f"{where}.endpoints[{position}].id: {endpoint.id!a} must be printable ASCII")
        try:
            if endpoint.url or endpoint.state is EndpointState.READY:
                parse_endpoint_url(endpoint.url)
        except (TableError, UnicodeError) as error:
            faults.append(f"{where}.endpoints[{position}].url: {error}")
    return faults
