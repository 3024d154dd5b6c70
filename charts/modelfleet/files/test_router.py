"""Asks a router what `helm test` wants to know: is it ready, and which models does it serve."""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ROUTER, API_KEY = os.environ["ROUTER"], os.environ.get("API_KEY", "")
DEADLINE = time.monotonic() + float(os.environ.get("WAIT_SECONDS", "60"))
# Whether it answers is the question; whose certificate it has is the clients'.
TRUST = ssl._create_unverified_context() if ROUTER.startswith("https:") else None


def get(path: str) -> tuple[int, str]:
    headers = {"authorization": f"Bearer {API_KEY}"} if API_KEY else {}
    request = urllib.request.Request(ROUTER + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5, context=TRUST) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


status, text = get("/readyz")
while status != 200 and time.monotonic() < DEADLINE:
    time.sleep(1)
    status, text = get("/readyz")
if status != 200:
    sys.exit(f"{ROUTER} is not ready: {status} {text.strip()}")
status, text = get("/v1/models")
if status == 401 and not API_KEY:
    print("ready; /v1/models asks for an API key: set test.apiKeySecret to look further")
    sys.exit()
if status != 200:
    sys.exit(f"{ROUTER}/v1/models: {status} {text.strip()}")
models = [model["id"] for model in json.loads(text)["data"]]
print("ready; models:", ", ".join(models) or "none yet")
