{{- define "modelfleet.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Prefix of all names: the release's, with the chart's where it is not in there already. */}}
{{- define "modelfleet.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Labels of an object: (dict "root" $ "component" "router"). */}}
{{- define "modelfleet.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "modelfleet.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: modelfleet
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "modelfleet.selectorLabels" -}}
app.kubernetes.io/name: {{ include "modelfleet.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Labels of pods: nothing in them changes with the chart's version alone, which would restart every router. */}}
{{- define "modelfleet.podLabels" -}}
{{ include "modelfleet.selectorLabels" . }}
app.kubernetes.io/part-of: modelfleet
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Metadata of an object: (dict "root" $ "component" "router" "name" "…"); namespace "" for a cluster's. */}}
{{- define "modelfleet.metadata" -}}
name: {{ .name }}
{{- if not .cluster }}
namespace: {{ .namespace | default .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "modelfleet.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "modelfleet.image" -}}
{{- $image := .Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{/* Name of a component's ServiceAccount: (dict "root" $ "component" "router"). */}}
{{- define "modelfleet.serviceAccount" -}}
{{- $account := (get .root.Values .component).serviceAccount -}}
{{- if $account.create -}}
{{ $account.name | default (printf "%s-%s" (include "modelfleet.fullname" .root) .component) }}
{{- else -}}
{{ $account.name | default "default" }}
{{- end }}
{{- end }}

{{/* What the pods of operator and router have in common: (dict "root" $ "values" .Values.router). */}}
{{- define "modelfleet.podPlacement" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* `spec.ray` of the chart's pool: a cluster through KubeRay unless an address is given. */}}
{{- define "modelfleet.poolRay" -}}
{{- if .Values.pool.ray.address -}}
{{ toYaml .Values.pool.ray }}
{{- else -}}
{{ toYaml (merge (dict) .Values.pool.ray (dict "cluster" dict)) }}
{{- end }}
{{- end }}

{{/* Base URL of the registry that the routers follow. */}}
{{- define "modelfleet.registry" -}}
{{- $ray := .Values.pool.ray -}}
{{- if .Values.router.registry -}}
{{ .Values.router.registry }}
{{- else if not .Values.pool.create -}}
{{- fail "router.registry is needed where pool.create is false: the registry's base URL, such as http://POOL-head-svc.NAMESPACE.svc:8267" }}
{{- else if $ray.registry -}}
{{ $ray.registry }}
{{- else if $ray.address -}}
{{- $host := (urlParse $ray.address).host -}}
http://{{ regexReplaceAll ":[0-9]+$" $host "" }}:8267
{{- else -}}
http://{{ .Values.pool.name }}-head-svc.{{ .Release.Namespace }}.svc:8267
{{- end }}
{{- end }}

{{/* Secret and key of the registry's token, as JSON; without a secret where the pool has none. */}}
{{- define "modelfleet.token" -}}
{{- $token := .Values.router.token -}}
{{- $ray := .Values.pool.ray -}}
{{- if $token.secret -}}
{{ dict "secret" $token.secret "key" ($token.key | default "auth_token") | toJson }}
{{- else if not .Values.pool.create -}}
{{ dict | toJson }}
{{- else if $ray.authToken -}}
{{ dict "secret" $ray.authToken.name "key" $ray.authToken.key | toJson }}
{{- else if $ray.address -}}
{{ dict | toJson }}
{{- else -}}
{{ dict "secret" (printf "%s-ray-token" .Values.pool.name) "key" "auth_token" | toJson }}
{{- end }}
{{- end }}

{{/* Secret with files of API keys; empty for none. */}}
{{- define "modelfleet.tenants" -}}
{{- if .Values.router.tenants.existingSecret -}}
{{ .Values.router.tenants.existingSecret }}
{{- else if .Values.router.tenants.keys -}}
{{ include "modelfleet.fullname" . }}-router-tenants
{{- end }}
{{- end }}

{{/* Combinations that can't work, told before anything is made. */}}
{{- define "modelfleet.validate" -}}
{{- if and (gt (int .Values.operator.replicas) 1) (not .Values.operator.leaderElection.enabled) }}
{{- fail "operator.replicas above 1 needs operator.leaderElection.enabled: two at work would undo each other's changes" }}
{{- end }}
{{- if and .Values.pool.ray.address .Values.pool.ray.cluster }}
{{- fail "set either pool.ray.address or pool.ray.cluster" }}
{{- end }}
{{- if and .Values.router.tenants.existingSecret .Values.router.tenants.keys }}
{{- fail "set either router.tenants.existingSecret or router.tenants.keys" }}
{{- end }}
{{- if and .Values.monitoring.podMonitor.enabled .Values.monitoring.serviceMonitor.enabled }}
{{- fail "monitoring: either podMonitor or serviceMonitor, both would count everything twice" }}
{{- end }}
{{- if and .Values.operator.watchNamespaces (not (has .Release.Namespace .Values.operator.watchNamespaces)) .Values.pool.create }}
{{- fail (printf "operator.watchNamespaces must hold %s, where the chart's pool is" .Release.Namespace) }}
{{- end }}
{{- if and .Values.router.httpRoute.enabled (not .Values.router.httpRoute.parentRefs) }}
{{- fail "router.httpRoute.parentRefs names no Gateway" }}
{{- end }}
{{- if and .Values.router.ingress.enabled (not .Values.router.ingress.hosts) }}
{{- fail "router.ingress.hosts names no host" }}
{{- end }}
{{- end }}
