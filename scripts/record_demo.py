"""`make record-demo`: records `make demo-cluster` anew, as docs/demo-cluster.cast and the picture beside it.

The recorder is asciinema (PyPI), svg-term-cli (npm) draws; both are installed under build/. Waits are cut,
so that the picture tells a minute and a half in half a minute. Nothing of the machine may be in it.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "build" / "record-demo"
CAST = ROOT / "docs" / "demo-cluster.cast"
PICTURE = CAST.with_suffix(".svg")
ASCIINEMA = "asciinema==2.4.0"
SVG_TERM = "svg-term-cli@2.1.1"
COLUMNS, ROWS = 104, 30
LONGEST_WAIT = 1.5
LAST_FRAME = 4.0
MOST_BYTES = 300_000
END = " deleted from demo namespace"
"""What kubectl says when everything went well."""


def main() -> int:
    """Record, cut, look for what must not be in it, and draw."""
    asciinema, svg_term = tools()
    raw = TOOLS / "raw.cast"
    size = [f"--cols={COLUMNS}", f"--rows={ROWS}"]
    command = [str(asciinema), "rec", "--overwrite", "--quiet", *size, "--env=TERM"]
    command += ["--title=make demo-cluster", "--command=make --no-print-directory demo-cluster", str(raw)]
    # What it needs is there before: the recording shows no installation.
    subprocess.run(["make", "--no-print-directory", "venv"], cwd=ROOT, check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    environment = clean | {"DEMO_ONCE": "1", "TERM": "xterm-256color"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    CAST.write_text(cut(raw.read_text()))
    draw = [str(svg_term), "--in", str(CAST), "--out", str(PICTURE), "--window"]
    subprocess.run([*draw, f"--width={COLUMNS}", f"--height={ROWS}"], check=True)
    for file in (CAST, PICTURE):
        if file.stat().st_size > MOST_BYTES:
            sys.exit(f"{file} has {file.stat().st_size} bytes; at most {MOST_BYTES} belong into a repository")
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size} bytes")
    return 0


def tools() -> tuple[Path, Path]:
    """The recorder and what draws, installed where they are missing."""
    asciinema, svg_term = TOOLS / "venv" / "bin" / "asciinema", TOOLS / "node_modules" / ".bin" / "svg-term"
    if not asciinema.exists():
        venv.create(TOOLS / "venv", with_pip=True)
        pip = [str(asciinema.with_name("python")), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", ASCIINEMA], check=True)
    if not svg_term.exists():
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(TOOLS), SVG_TERM]
        subprocess.run(install, check=True)
    return asciinema, svg_term


def raw_tail(text: str) -> str:
    """The end of what was shown."""
    return "".join(json.loads(line)[2] for line in text.splitlines()[-20:] if line.startswith("["))


def cut(text: str) -> str:
    """The recording with short waits and a last frame that stays.

    Raises:
        SystemExit: something of this machine is in it.
    """
    for private in (str(ROOT), str(Path.home()), socket.gethostname(), f"{getpass.getuser()}@"):
        if private in text:
            sys.exit(f"the recording has {private!r} in it")
    if END not in text:
        sys.exit(f"the demo did not end well: {raw_tail(text)}")
    header, *lines = text.splitlines()
    kept = {k: v for k, v in json.loads(header).items() if k in ("version", "width", "height", "title")}
    events, now, before = [], 0.0, 0.0
    for line in lines:
        at, kind, data = json.loads(line)
        now += min(at - before, LONGEST_WAIT)
        before = at
        events.append([round(now, 3), kind, data])
    command = "$ make demo-cluster\r\n"
    events = [[0.0, "o", command], *events, [round(now + LAST_FRAME, 3), "o", ""]]
    return "\n".join(json.dumps(each, ensure_ascii=False) for each in (kept, *events)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
