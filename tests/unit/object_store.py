"""A small object store: one bucket behind the S3 API, which Google's XML API is alike."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KEY = "tester"
BUCKET = "bucket"


class ObjectStore:
    """Serves ``files`` by their path in the bucket, on loopback, while it is entered.

    Attributes:
        files: content by path.
        bytes_sent: of files.
        cut_off: so many of the next reads of a file end half way, as when a connection breaks.
    """

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = files or {}
        self.bytes_sent = 0
        self.cut_off = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.store = self
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, key: str = KEY) -> dict[str, str]:
        """What lets ``s3://`` and ``gs://`` find it."""
        google = {"gcs_base_url": self.url, "disable_oauth": True, "client_email": "", "private_key": "",
                  "private_key_id": ""}  # fmt: skip
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(google),
        }


class _Server(ThreadingHTTPServer):
    store: ObjectStore


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        signature = self.headers.get("Authorization", "")
        if signature.startswith("AWS4") and f"Credential={KEY}/" not in signature:
            self._answer(403, b"<Error><Code>InvalidAccessKeyId</Code></Error>")
        elif bucket != BUCKET:
            self._answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        elif not key:
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self._answer(200, self._listing(query.get("prefix", ""), query.get("delimiter", "")))
        elif key in self.server.store.files:
            self._file(self.server.store.files[key])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _listing(self, prefix: str, delimiter: str) -> bytes:
        files = {name: data for name, data in self.server.store.files.items() if name.startswith(prefix)}
        folders = {
            prefix + rest.partition(delimiter)[0] + delimiter
            for name in files
            if delimiter and delimiter in (rest := name.removeprefix(prefix))
        }
        shown = [name for name in sorted(files) if not any(name.startswith(folder) for folder in folders)]
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"e"</ETag><Size>{len(files[name])}</Size></Contents>'
            for name in shown
        )
        prefixes = "".join(
            f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders)
        )
        return (
            f"<ListBucketResult><Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(shown)}</KeyCount>{contents}{prefixes}</ListBucketResult>"
        ).encode()

    def _file(self, data: bytes) -> None:
        store = self.server.store
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found, "files are read in ranges alone"
        begin, end = int(found[1]), min(int(found[2]) + 1, len(data))
        part = data[begin:end]
        headers = {
            "ETag": '"e"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}",
        }
        store.bytes_sent += len(part)
        if store.cut_off:
            store.cut_off -= 1
            self._answer(206, part[: len(part) // 2], {**headers, "Content-Length": str(len(part))})
            self.close_connection = True
            return
        self._answer(206, part, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return
