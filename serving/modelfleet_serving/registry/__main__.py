"""``python -m modelfleet_serving.registry``: the registry as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from modelfleet_serving.contract import REGISTRY_PORT
from modelfleet_serving.ray_token import TokenError, authentication_disabled, load_token, read_token
from modelfleet_serving.registry.server import RegistryServer


async def serve(host: str, port: int, token: str | None, bind_seconds: float) -> None:
    """Run until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = RegistryServer(token)
    async with server.running(host, port, bind_seconds):
        print(f"registry: http://{host}:{server.port}", flush=True)
        await stop.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m modelfleet_serving.registry")
    parser.add_argument("--listen", default=f"127.0.0.1:{REGISTRY_PORT}", metavar="HOST:PORT")
    parser.add_argument("--token-file", type=Path, help="default: where Ray looks for its token")
    parser.add_argument("--bind-timeout", type=float, default=10.0, metavar="SECONDS",
                        help="how long to wait for a port that is taken")  # fmt: skip
    options = parser.parse_args(arguments)
    host, _, port = options.listen.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--listen {options.listen!r} is not HOST:PORT")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        token = read_token(options.token_file) if options.token_file else load_token()
        if token is None and not authentication_disabled():
            raise TokenError(  # noqa: TRY301  said in the same way as the others
                "there is no token: set RAY_AUTH_TOKEN_PATH or --token-file, or RAY_AUTH_MODE=disabled"
            )
        asyncio.run(serve(host.strip("[]"), int(port), token, options.bind_timeout))
    except (TokenError, OSError) as error:
        print(f"registry: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
