"""Platforms for end-to-end tests."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.e2e.platform import Platform

from modelfleet_operator.local_pool import local_pool

VLLM = """\
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {{name: smollm2}}
spec:
  model: {{source: "file://{bf16}"}}
  engine: {{type: vLLM, maxModelLen: 2048, maxNumSeqs: 16}}
  variants:
  - name: bf16
    accelerators: [{{type: {accelerator}}}]
  - name: int8
    source: "file://{w8a8}"
    quantization: CompressedTensors
    accelerators: [{{type: {accelerator}}}]
  routing:
    weights: {{bf16: 50, int8: 50}}
    fallback: [int8, bf16]
  rollout: {{drainTimeout: 120s}}
"""

SIMULATED = """\
apiVersion: modelfleet.io/v1alpha1
kind: ModelDeployment
metadata: {name: sim}
spec:
  model: {source: "hf://none/simulated"}
  engine: {type: Simulator, lora: {}}
  variants:
  - name: a
    accelerators: [{type: CPU}]
  - name: b
    accelerators: [{type: CPU}]
  routing:
    weights: {a: 30, b: 70}
    fallback: [b, a]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accelerator() -> str:
    """What the engines of these tests run on: this machine's first GPU, or its CPU."""
    return local_pool("default", "default").spec.accelerators[0].type


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The platform with simulated engines."""
    platform = Platform(tmp_path_factory.mktemp("sim"), SIMULATED, free_port())
    try:
        platform.wait_ready("a", "b", seconds=120)
        yield platform
    finally:
        platform.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The platform with real vLLM and a real small model in two quantizations; on a GPU if there is one."""
    install = [sys.executable, "-m", "modelfleet_serving.environments", "install", "vllm"]
    subprocess.run(install, check=True, timeout=900)
    make = [sys.executable, "-m", "modelfleet_serving.demo_model", "--json"]
    made = subprocess.run(make, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    paths = json.loads(made.stdout)
    platform = Platform(
        tmp_path_factory.mktemp("vllm"), VLLM.format(accelerator=accelerator(), **paths), free_port()
    )
    try:
        platform.wait_ready("bf16", "int8", seconds=600)
        yield platform
    finally:
        platform.close()
