#!/usr/bin/env bash
# Makes .venv with the locked dependencies. Needs only Python 3.11 or newer and a package index; shows what it does.
# Does nothing when .venv already matches the lock.
set -euo pipefail
cd "$(dirname "$0")/.."
group=${1:-dev}
lock="requirements/${group}.txt"
venv=.venv

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "modelfleet needs Python 3.11, 3.12 or 3.13; none was found (set PYTHON=/path/to/python3.11)" >&2
  return 1
}

want=$(cat "$lock" pyproject.toml scripts/bootstrap.sh | cksum)
if [ -x "$venv/bin/modelfleet" ] && [ "$(cat "$venv/.lock-$group" 2>/dev/null)" = "$want" ]; then
  exit 0
fi

started=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  echo "==> making $venv with $("$python" --version)"
  "$python" -m venv "$venv" || {
    echo "The venv module failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  }
fi
echo "==> installing $(grep -c '==' "$lock") locked packages"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep -E '^uv==' requirements/dev.txt)"
# uv reads no pip.conf: hand it an index that pip was given there.
index=$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)
if [ -n "${PIP_INDEX_URL:-$index}" ]; then
  export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$index}}
fi
"$venv/bin/uv" pip install --python "$venv/bin/python" --requirement "$lock"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --editable .
echo "$want" > "$venv/.lock-$group"
echo "==> ready after $((SECONDS - started)) s"
