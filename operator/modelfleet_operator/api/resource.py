"""What both resources share."""

from __future__ import annotations

from typing import ClassVar, Literal

from modelfleet_operator.api.base import MAX_NAME_LENGTH, ApiModel, Rule
from modelfleet_operator.api.metadata import Metadata


class Resource(ApiModel):
    """A Kubernetes resource of the group; ``kind``, ``spec`` and ``status`` are the subclasses'."""

    api_version: Literal["modelfleet.io/v1alpha1"] = "modelfleet.io/v1alpha1"
    """Version of this schema."""
    kind: str
    """Kind of the resource."""
    metadata: Metadata
    """Name and namespace."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel=f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
            message=f"metadata.name must have at most {MAX_NAME_LENGTH} characters",
            check=lambda self: len(self.metadata.name) <= MAX_NAME_LENGTH,
            field="metadata.name",
        ),
    )

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.metadata.namespace}/{self.metadata.name}"
