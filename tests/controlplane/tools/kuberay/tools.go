//go:build tools

// Package tools pins the KubeRay operator. It has a module of its own: as released it is
// built with an older controller-runtime than kwok's, and one module holds one version.
package tools

import _ "github.com/ray-project/kuberay/ray-operator"
