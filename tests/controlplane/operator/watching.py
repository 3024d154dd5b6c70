"""Streams with the time of each piece: what a user's watch and a router's long poll see, and when."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import msgspec
from kubernetes.client import CustomObjectsApi
from kubernetes.config import new_client_from_config
from tests.controlplane.operator.processes import RegistryProcess
from urllib3.exceptions import ProtocolError

from modelfleet_operator.api import GROUP, VERSION
from modelfleet_serving.contract import ModelRoute, TableUpdate

_T = TypeVar("_T")


class Stream(ABC, Generic[_T]):
    """Pieces that arrive on a thread, each with its monotonic time."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, _T]] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, name=type(self).__name__, daemon=True)

    @abstractmethod
    def _read(self) -> None:
        """Call :meth:`take` with each piece until closed."""

    @abstractmethod
    def close(self) -> None:
        """End it."""

    def take(self, piece: _T) -> None:
        with self._news:
            self._seen.append((time.monotonic(), piece))
            self._news.notify_all()

    def first(self, holds: Callable[[_T], bool], *, timeout: float = 15, what: str = "") -> float:
        """Monotonic time of the first piece for which something holds.

        Raises:
            TimeoutError: there was none.
        """
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for at, piece in self._seen:
                    if holds(piece):
                        return at
                if not self._news.wait(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(
                        f"{what or 'nothing of the kind'} within {timeout:g} s: {self._seen[-1:]}"
                    )

    def after(self, at: float, holds: Callable[[_T], bool]) -> list[_T]:
        """Pieces that came later than a monotonic time, and for which something holds."""
        with self._news:
            return [piece for when, piece in self._seen if when > at and holds(piece)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._thread.join(timeout=10)


class Watch(Stream[dict[str, Any]]):
    """The ModelDeployments of a namespace, watched from now on: it is connected before it is entered."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        super().__init__()
        self._closed = False
        calls = CustomObjectsApi(new_client_from_config(str(kubeconfig)))
        where = (GROUP, VERSION, namespace, "modeldeployments")
        now = calls.list_namespaced_custom_object(*where)["metadata"]["resourceVersion"]
        self._answer = calls.list_namespaced_custom_object(
            *where, watch=True, resource_version=now, timeout_seconds=300, _preload_content=False
        )

    def _read(self) -> None:
        rest = b""
        try:
            while chunk := self._answer.read1():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self.take(json.loads(line)["object"])
        except ProtocolError:
            if not self._closed:
                raise

    def close(self) -> None:
        self._closed = True
        self._answer.shutdown()


class RouterPoll(Stream[ModelRoute]):
    """The models of the route table, as a router's long poll gets them."""

    def __init__(self, registry: RegistryProcess) -> None:
        super().__init__()
        self._registry = registry
        self._closed = threading.Event()

    def _read(self) -> None:
        epoch, version = "", -1
        while not self._closed.is_set():
            query = f"epoch={epoch}&version={version}&timeout=1&router=watching"
            request = urllib.request.Request(
                f"{self._registry.url}/v1/table?{query}",
                headers={"authorization": f"Bearer {self._registry.token}"},
            )
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    update = msgspec.json.decode(answer.read(), type=TableUpdate)
            except urllib.error.HTTPError as error:
                if error.code != 304:
                    raise
                continue
            epoch, version = update.epoch, update.version
            for model in update.models:
                self.take(model)

    def close(self) -> None:
        self._closed.set()


def has(body: dict[str, Any], kind: str, status: str = "True") -> bool:
    """Whether a condition of the newest generation stands so."""
    return any(
        c["type"] == kind
        and c["status"] == status
        and c.get("observedGeneration") == body["metadata"]["generation"]
        for c in body.get("status", {}).get("conditions", ())
    )
