"""What can go wrong when the operator speaks with another process."""

from __future__ import annotations


class ClientError(Exception):
    """A call failed; the message names the address and the cause, never a secret."""


class UnavailableError(ClientError):
    """Nobody answers, or not in time: try again later."""


class RefusedError(ClientError):
    """The other side understood the call and says no: trying again without a change is no use.

    Args:
        message: see above.
        status: of the HTTP answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
