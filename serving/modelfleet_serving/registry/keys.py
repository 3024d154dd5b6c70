"""What the registry's parts know things by."""

from __future__ import annotations

DeploymentKey = tuple[str, str]
"""Namespace and name of a ModelDeployment."""
