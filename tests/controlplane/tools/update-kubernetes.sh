#!/usr/bin/env bash
# Moves the test bed to another Kubernetes release: tests/controlplane/tools/update-kubernetes.sh v1.37.2
# The staging modules (k8s.io/api, k8s.io/client-go, ...) have no versions in k8s.io/kubernetes' own go.mod, only
# replacements by folders that its module doesn't contain: each gets the published v0.MINOR.PATCH instead.
set -euo pipefail
version=${1:?the release, such as v1.37.2}
staging="v0.${version#v1.}"
cd "$(dirname "$0")/kubernetes"
released=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
edits=("-require=k8s.io/kubernetes@$version")
while read -r module; do
  edits+=("-replace=$module=$module@$staging")
done < <(sed -n 's#^\s*\(k8s.io/[a-z-]*\) => ./staging/.*#\1#p' "$released")
echo "k8s.io/kubernetes $version with $((${#edits[@]} - 1)) staging modules at $staging"
go mod edit "${edits[@]}"
go mod tidy
