"""TLS contexts: the listener's, whose certificate is renewed while it serves, and the one towards engines."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Final

from modelfleet_serving.router.settings import Settings, SettingsError

_log = logging.getLogger(__name__)

POLL_SECONDS: Final = 5.0
"""Time between looks at the certificate: renewals come weeks before the old one ends."""


class ListenerTls:
    """The listener's certificate.

    Attributes:
        context: of the listener; takes over a renewed certificate for new connections.
    """

    def __init__(self, certificate: str, key: str) -> None:
        """Reads both files.

        Raises:
            SettingsError: with the files, when they are no certificate with its key.
        """
        self._files = (Path(certificate), Path(key))
        try:
            self._stamp = self._look()
            self.context = self._read()
        except OSError as error:
            names = f"--tls-certificate {certificate}, --tls-key {key}"
            raise SettingsError(f"{names}: {_reason(error)}") from error

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        status = [path.stat() for path in self._files]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in status)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(*self._files)
        return context

    async def follow(self) -> None:
        """Takes over renewed certificates; one that can't be used changes nothing."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                stamp = self._look()
                if stamp == self._stamp:
                    continue
                self._stamp = stamp
                # A context whose loading failed has half of the new pair: the living one gets only good ones.
                self._read()
                self.context.load_cert_chain(*self._files)
            except OSError as error:
                _log.error("the certificate stays as it was: %s", _reason(error))
            else:
                _log.info("certificate reread")


def engine_context(authority: str) -> ssl.SSLContext:
    """The context towards engines, which verifies their certificates and names.

    Args:
        authority: File with the certificates that theirs must be signed by; empty for the system's.

    Raises:
        SettingsError: when the file holds none.
    """
    try:
        return ssl.create_default_context(cafile=authority or None)
    except OSError as error:
        raise SettingsError(f"--engine-ca {authority}: {_reason(error)}") from error


def check_files(settings: Settings) -> None:
    """Reads all certificates once, so that a mistake is told at the start and by one process.

    Raises:
        SettingsError: with the option, the file and what is wrong with it.
    """
    if settings.tls_certificate:
        ListenerTls(settings.tls_certificate, settings.tls_key)
    if settings.engine_ca:
        engine_context(settings.engine_ca)


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not a usable certificate and key ({error.reason or error})"
    return error.strerror or str(error)
