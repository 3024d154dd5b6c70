#!/usr/bin/env bash
# Resolves pyproject.toml into pinned files, one a process kind. No index address is written into them.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
compile() { # output, arguments...
  local out=$1
  shift
  "$uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
    --no-emit-find-links --output-file "$out" pyproject.toml "$@"
  echo "$out: $(grep -c '==' "$out") packages"
}
compile requirements/dev.txt --extra local --extra native --group dev
# The development environment with what the benchmarks' reports need.
compile requirements/bench.txt --extra local --extra native --group dev --group bench --constraint requirements/dev.txt
# The images install subsets; the versions are those of dev.txt.
for extra in operator router tracing native serving models; do
  compile "requirements/$extra.txt" --extra "$extra" --constraint requirements/dev.txt
done
