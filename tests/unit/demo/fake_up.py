"""Stands for `modelfleet up` in tests of the demo: says that both variants serve, and answers as it is told.

FAKE_UP: ``ok``, ``empty`` (int8 answers without a word), ``busy`` (503), ``dies`` (before anything serves).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOW = os.environ["FAKE_UP"]
STATE = Path(os.environ["MODELFLEET_STATE"])


class Router(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = "" if HOW == "empty" and asked["model"].endswith(":int8") else "Paris."
        base = {"id": "1", "created": 0, "model": asked["model"]}
        if HOW == "busy":
            self._answer(503, "application/json", json.dumps({"error": {"message": "nothing can serve"}}))
        elif asked.get("stream"):
            choice = {"index": 0, "delta": {"content": content}, "finish_reason": "stop"}
            chunk = base | {"object": "chat.completion.chunk", "choices": [choice]}
            self._answer(200, "text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")
        else:
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._answer(
                200, "application/json", json.dumps(base | {"object": "chat.completion", "choices": [choice]})
            )

    def _answer(self, status: int, kind: str, body: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("x-should-retry", "false")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def main() -> int:
    if HOW == "dies":
        return 3
    over = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: over.set())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Router)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    serving = [{"reason": "Serving"}] * (1 if HOW == "slow" else 2)
    state = {
        "router": f"http://127.0.0.1:{server.server_port}",
        "deployments": [{"status": {"variants": serving}}],
    }
    (STATE / "state.new").write_text(json.dumps(state))
    (STATE / "state.new").rename(STATE / "state.json")
    over.wait()
    server.shutdown()
    print("up has ended", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
