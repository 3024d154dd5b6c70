"""The route table with versions: what changed since a router last asked. Pure."""

from __future__ import annotations

import msgspec

from modelfleet_serving.contract import ModelRoute, TableUpdate

REMEMBERED_REMOVALS = 4096


class VersionedTable:
    """Models with the version in which each last changed.

    Args:
        epoch: of this registry's life; versions of another epoch mean nothing here.
    """

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.version = 1
        # In the order of their last change, so that a delta reads only its own part.
        self._models: dict[str, tuple[int, ModelRoute]] = {}
        self._removed: dict[str, int] = {}
        self._complete_since = 0
        """Removals after this version are all remembered."""
        self._encoded: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._models)

    def set(self, model: ModelRoute) -> bool:
        """Put a model; whether it is a change."""
        known = self._models.get(model.name)
        if known is not None and known[1] == model:
            return False
        self._step()
        self._models.pop(model.name, None)  # to the end
        self._models[model.name] = (self.version, model)
        self._removed.pop(model.name, None)
        return True

    def remove(self, name: str) -> bool:
        """Take a model out; whether it was there."""
        if self._models.pop(name, None) is None:
            return False
        self._step()
        self._removed[name] = self.version
        if len(self._removed) > REMEMBERED_REMOVALS:
            oldest = next(iter(self._removed))
            self._complete_since = self._removed.pop(oldest)
        return True

    def encoded_since(self, epoch: str, version: int) -> bytes:
        """:meth:`since` as JSON; many routers ask for the same."""
        base = version if self._is_known(epoch, version) else -1
        if base not in self._encoded:
            self._encoded[base] = msgspec.json.encode(self.since(epoch, version))
        return self._encoded[base]

    def since(self, epoch: str, version: int) -> TableUpdate:
        """What a router that has this version doesn't know: a delta, or everything."""
        if not self._is_known(epoch, version):
            models = [model for _, model in self._models.values()]
            return TableUpdate(epoch=self.epoch, version=self.version, full=True, models=models)
        changed = []
        for changed_in, model in reversed(self._models.values()):
            if changed_in <= version:
                break
            changed.append(model)
        removed = [name for name, removed_in in self._removed.items() if removed_in > version]
        return TableUpdate(
            epoch=self.epoch, version=self.version, full=False, models=changed[::-1], removed=removed
        )

    def is_current(self, epoch: str, version: int) -> bool:
        """Whether this is the newest table."""
        return epoch == self.epoch and version == self.version

    def _is_known(self, epoch: str, version: int) -> bool:
        return epoch == self.epoch and max(self._complete_since, 1) <= version <= self.version

    def _step(self) -> None:
        self.version += 1
        self._encoded.clear()
