"""The token that the processes of one Ray cluster share, found where Ray itself looks for it.

Ray 2.60 takes ``RAY_AUTH_TOKEN``, then the file ``RAY_AUTH_TOKEN_PATH``, then ``~/.ray/auth_token``, each
without surrounding blanks (https://docs.ray.io/en/latest/ray-security/token-auth.html). The registry uses
the same one, so that there is no second secret to hand out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


class TokenError(Exception):
    """The place that is configured for the token holds none."""


def load_token(environment: Mapping[str, str] | None = None) -> str | None:
    """The token, or ``None`` where nothing is configured and the default file isn't there.

    Raises:
        TokenError: ``RAY_AUTH_TOKEN_PATH`` names a file that can't be read or is empty.
    """
    env = os.environ if environment is None else environment
    if token := env.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if path := env.get("RAY_AUTH_TOKEN_PATH", ""):
        return read_token(Path(path))
    default = Path(env.get("HOME") or Path.home()) / ".ray" / "auth_token"
    try:
        return default.read_text().strip() or None
    except OSError:
        return None


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        TokenError: it can't be read or is empty.
    """
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise TokenError(f"token file {path}: {error.strerror}") from error
    if not token:
        raise TokenError(f"token file {path} is empty")
    return token


def authentication_disabled(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the administrator turned Ray's authentication off."""
    env = os.environ if environment is None else environment
    return env.get("RAY_AUTH_MODE", "").strip().lower() == "disabled"
