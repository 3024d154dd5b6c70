"""What all API types share: strictness, camelCase, and rules that hold in Python and in CEL alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

GROUP: Final = "modelfleet.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
FINALIZER: Final = f"{GROUP}/operator"
MAX_NAME_LENGTH: Final = 40
"""Names of resources and variants: children are named after both and must fit 253 and 63 characters."""

HELD_BY_SCHEMA: Final = ""
"""In place of a CEL expression: the API server holds the rule by list maps, only files need the check."""

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DURATION = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
BYTES = QUANTITY.replace("(m|", "(")
MEMORY = (
    r"^(0*[1-9][0-9]*(\.[0-9]+)?(M|G|T|Mi|Gi|Ti)|0+\.[0-9]*[1-9][0-9]*(G|T|Gi|Ti)"
    r"|0*[1-9][0-9]{3,}(\.[0-9]+)?(k|Ki)|0*[1-9][0-9]{6,}(\.[0-9]+)?)$"
)
"""A quantity of bytes, at least a million: less is a number without its unit."""
SMALLEST_MEMORY: Final = 1_000_000
_QUANTITY_LENGTH: Final = 32


def _as_text(value: object) -> object:
    """What is written as a whole number, as text."""
    return str(value) if type(value) is int else value


def _int_or_string(pattern: str, smallest: int) -> WithJsonSchema:
    """The schema of a quantity: Kubernetes takes ``4`` as well as ``"4"``, and so do we."""
    return WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": pattern,
            "maxLength": _QUANTITY_LENGTH,
            "minimum": smallest,
        }
    )


Name = Annotated[str, StringConstraints(pattern=DNS_LABEL, min_length=1, max_length=MAX_NAME_LENGTH)]
Duration = Annotated[str, StringConstraints(pattern=DURATION, max_length=32)]
Quantity = Annotated[
    str,
    StringConstraints(pattern=QUANTITY, max_length=_QUANTITY_LENGTH),
    BeforeValidator(_as_text),
    _int_or_string(QUANTITY, 0),
]
"""A Kubernetes quantity, always text here."""
Memory = Annotated[
    str,
    StringConstraints(pattern=BYTES, max_length=_QUANTITY_LENGTH),
    BeforeValidator(_as_text),
    _int_or_string(MEMORY, SMALLEST_MEMORY),
]
"""A quantity of bytes; its owner has a :func:`memory_rule`."""
Percent = Annotated[int, Field(ge=1, le=100)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]

_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_DURATION_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_QUANTITY_FACTOR = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip


def duration_seconds(value: str) -> float:
    """Seconds of a duration such as ``300s`` or ``1h30m``."""
    return sum(float(n) * _DURATION_SECONDS[unit] for n, unit in _DURATION_PART.findall(value))


def quantity_value(value: str) -> float:
    """Number of a Kubernetes quantity such as ``24Gi`` or ``500m``."""
    number = value.rstrip("mkMGTKi")
    return float(number) * _QUANTITY_FACTOR[value[len(number) :]]


@dataclass(frozen=True)
class Rule:
    """A cross-field rule, said twice: in CEL for the API server, in Python for files and for the operator.

    Attributes:
        cel: the CEL expression, with ``self`` as the object that carries the rule, or HELD_BY_SCHEMA.
        message: what the user reads when it does not hold.
        check: the same in Python; ``None`` for rules on updates, which only the API server can see.
        field: path below the object that the message is about.
    """

    cel: str
    message: str
    check: Callable[[Any], bool] | None
    field: str = ""


def memory_rule(field: str, attribute: str) -> Rule:
    """The rule that an amount of memory has a unit that makes sense.

    The schema holds it: CEL would have to read text whose length it does not know on older API servers.

    Args:
        field: as users write it.
        attribute: the same in Python.
    """

    def enough(owner: Any) -> bool:
        value = getattr(owner, attribute)
        return value is None or quantity_value(value) >= SMALLEST_MEMORY

    return Rule(
        cel=HELD_BY_SCHEMA,
        message=f"{field} must be at least 1M: write a unit, as in 8Gi",
        check=enough,
        field=field,
    )


class RuleFailuresError(ValueError):
    """The rules that an object breaks; expanded into one problem each by :mod:`.problems`."""

    def __init__(self, rules: list[Rule]) -> None:
        super().__init__("; ".join(rule.message for rule in rules))
        self.rules = rules


class ApiModel(BaseModel):
    """Base of all API types. Unknown fields are refused, values are never coerced."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    """Cross-field rules of this object."""

    @model_validator(mode="after")
    def _hold_rules(self) -> ApiModel:
        broken = [rule for rule in self.rules if rule.check is not None and not rule.check(self)]
        if broken:
            raise RuleFailuresError(broken)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The object as it stands in YAML, without fields that were not set."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")
