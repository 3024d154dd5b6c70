"""TLS on both sides: the router's own listener, and engines behind https."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.unit.router.harness import Client, Engine, Harness, harness, model, post, until


@dataclass
class Pair:
    """A self-signed certificate for 127.0.0.1 and localhost."""

    certificate: Path
    key: Path
    serial: int

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def client(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.certificate))
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


def make_pair(directory: Path, name: str = "tls", *, host: str = "localhost") -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.UTC)
    serial = x509.random_serial_number()
    names: list[x509.GeneralName] = [x509.DNSName(host)]
    if host == "localhost":
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pair = Pair(directory / f"{name}.crt", directory / f"{name}.key", serial)
    pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pair.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path)


async def _connect(router: Harness, context: ssl.SSLContext) -> Client:
    client = Client(*await asyncio.open_connection("127.0.0.1", router.port, ssl=context))
    router.clients.append(client)
    return client


def _peer(client: Client) -> int:
    shown = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(shown).serial_number


@contextlib.asynccontextmanager
async def _serving(pair: Pair, **settings: object) -> AsyncIterator[Harness]:
    files = {"tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}
    async with harness(**files, **settings) as router:
        await router.table(model(a=[await router.engine("r1")]))
        yield router


async def test_requests_over_tls(pair: Pair) -> None:
    async with _serving(pair) as router:
        for offered in ((), ("http/1.1",), ("h2", "http/1.1"), ("h2",)):
            client = await _connect(router, pair.client(*offered))
            chosen = client.writer.get_extra_info("ssl_object").selected_alpn_protocol()
            assert chosen == ("http/1.1" if "http/1.1" in offered else None)
            client.send(post() * 3)
            assert [(await client.answer()).status for _ in range(3)] == [200] * 3
            client.send(post(headers={"connection": "close"}))
            assert (await client.answer()).status == 200
            assert await client.closed()
        body = b'{"model":"m","x":"' + b"y" * 3_000_000 + b'"}'
        client = await _connect(router, pair.client())
        client.send(post(body=body))
        assert (await client.answer()).status == 200
        assert router.engines[0].requests[-1].body == body


async def test_old_protocols_are_refused(pair: Pair) -> None:
    async with _serving(pair) as router:
        context = pair.client()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert (await _connect(router, context)).writer.get_extra_info("ssl_object").version() == "TLSv1.2"


async def test_what_is_no_tls_is_let_go(pair: Pair) -> None:
    """Plain HTTP on the TLS port, and clients that never finish their handshake, use up nothing."""
    async with _serving(pair, header_timeout=0.2) as router:
        plain, silent = await router.client(), await router.client()
        plain.send(post())
        silent.send(b"\x16\x03\x01")
        for client in (plain, silent):
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(client.reader.read(), 3)
        client = await _connect(router, pair.client())
        client.send(post())
        assert (await client.answer()).status == 200
        await client.close()
        await until(lambda: not router.worker.clients)


async def test_a_renewed_certificate_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfleet_serving.router.tls.POLL_SECONDS", 0.01)
    first = make_pair(tmp_path)
    async with _serving(first) as router:
        old = await _connect(router, first.client())
        assert _peer(old) == first.serial
        first.key.write_text("rubbish")  # half of a renewal
        await asyncio.sleep(0.05)
        second = make_pair(tmp_path)
        os.utime(second.certificate, (1, 1))

        async def renewed() -> bool:
            with contextlib.suppress(ssl.SSLError):
                return _peer(await _connect(router, second.client())) == second.serial
            return False

        deadline = asyncio.get_running_loop().time() + 5
        while not await renewed():
            assert asyncio.get_running_loop().time() < deadline
        old.send(post())
        assert (await old.answer()).status == 200


async def test_engines_behind_https_are_verified(tmp_path: Path, pair: Pair) -> None:
    other = make_pair(tmp_path, "other", host="elsewhere")
    for served, trusted, status in (
        (pair, str(pair.certificate), 200),
        (pair, "", 503),  # signed by nobody the system knows
        (other, str(other.certificate), 503),  # another name
    ):
        async with harness(engine_ca=trusted) as router:
            engine = Engine("r1")
            server = await asyncio.start_server(engine._serve, "127.0.0.1", 0, ssl=served.server())
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await router.table(
                {"name": "m", "variants": [{"name": "a", "endpoints": [{"id": "r1", "url": url}]}]}
            )
            answers = [await router.ask() for _ in range(2)]
            assert [answer.status for answer in answers] == [status] * 2
            if status == 503:
                assert "certificate" in answers[0].error["message"].lower()
            else:
                assert engine.connections == 1
            server.close()
            await engine.stop()


async def test_idle_engines_behind_https_are_checked(pair: Pair) -> None:
    async with harness(engine_ca=str(pair.certificate), health_interval=0.02) as router:
        good, sick = Engine("good"), Engine("sick")
        servers = [
            await asyncio.start_server(one._serve, "127.0.0.1", 0, ssl=pair.server()) for one in (good, sick)
        ]
        endpoints = [
            {"id": one.name, "url": f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"}
            for one, server in zip((good, sick), servers, strict=True)
        ]
        await router.table({"name": "m", "variants": [{"name": "a", "endpoints": endpoints}]})
        await until(lambda: good.requests and sick.requests)
        assert good.requests[0].line.startswith("GET /health ")
        servers[1].close()
        await sick.stop()
        refs = router.worker.table.models["m"].variants["a"].endpoints
        await until(lambda: refs[1].limit == 0)
        assert refs[0].limit
        servers[0].close()
        await good.stop()
