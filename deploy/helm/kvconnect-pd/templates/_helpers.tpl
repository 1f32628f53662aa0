{{- define "kvconnect.labels" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Of containers that need nothing. */}}
{{- define "kvconnect.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* One end's --kv-transfer-config. The kubelet puts POD_IP in. */}}
{{- define "kvconnect.transfer" -}}
{{- $extra := dict "bind_host" "$(POD_IP)" "key_file" "/etc/kvconnect/key" -}}
{{- $transfer := dict "kv_connector" .root.Values.connector -}}
{{- if eq .component "prefill" -}}
{{- $_ := set $extra "port" (int .root.Values.ports.control) -}}
{{- $_ := set $transfer "kv_role" "kv_producer" -}}
{{- else -}}
{{- $_ := set $transfer "kv_role" "kv_consumer" -}}
{{- $_ := set $transfer "kv_load_failure_policy" "recompute" -}}
{{- end -}}
{{- $_ := set $transfer "kv_connector_extra_config" (merge (deepCopy .root.Values.options) $extra) -}}
{{ toJson $transfer }}
{{- end }}
