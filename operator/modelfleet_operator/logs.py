"""Logs of the operator's processes: one line an event, without secrets."""

from __future__ import annotations

import logging
import sys


def set_up_logging(level: str) -> None:
    """Log to stderr, once, in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
