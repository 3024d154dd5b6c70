"""A tiny engine for tests: answers, fails, hangs or leaves children behind, as its arguments say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

options = json.loads(sys.argv[1])
running: list[int] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            broken = Path(options["folder"], "broken").exists()
            self.send_response(503 if broken else 200)
            self.end_headers()
        elif self.path == "/metrics":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"test_running {len(running)}\ntest_waiting 0\ntest_kv 0.25\n".encode())
        elif self.path == "/slow":
            running.append(1)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"first\n")
            self.wfile.flush()
            while not Path(options["folder"], "finish").exists():
                time.sleep(0.02)
            self.wfile.write(b"last\n")
            running.pop()

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    mode = options.get("mode", "serve")
    print("engine", os.getpid(), "token is", os.environ.get("TEST_TOKEN", "-"), flush=True)
    if mode == "fail":
        print("ValueError: the weights are not what they seem", flush=True)
        sys.exit(3)
    if mode == "oom":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB", flush=True)
        sys.exit(1)
    if mode == "silent":
        print("startup complete", flush=True)
        time.sleep(1000)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Two workers: one in a session of its own, one that ignores SIGTERM.
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1000"])
    print("loaded 1.5 GiB", flush=True)
    server = ThreadingHTTPServer((options["host"], options["port"]), Handler)

    def finish(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()

    if mode != "stubborn":
        signal.signal(signal.SIGTERM, finish)
    server.serve_forever(poll_interval=0.02)


main()
