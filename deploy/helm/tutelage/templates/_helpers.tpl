{{- define "labels" -}}
app.kubernetes.io/name: tutelage
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "selector" -}}
app.kubernetes.io/name: tutelage
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "pod" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "place" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Requests equal limits: a GPU cannot be shared, and whoever takes memory that was not asked for is killed. */ -}}
{{- define "resources" -}}
{{- $all := dict "cpu" .cpu "memory" .memory }}
{{- if .gpus }}{{ $_ := set $all "nvidia.com/gpu" (toString .gpus) }}{{ end -}}
requests: {{ toYaml $all | nindent 2 }}
limits: {{ toYaml $all | nindent 2 }}
{{- end }}

{{- define "hub" -}}
{{- if .Values.secrets.hub }}
- name: HF_TOKEN_PATH
  value: /secrets/hub/token
{{- end }}
{{- end }}

{{- define "dns" -}}
- ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- end }}

{{- define "monitored" -}}
{{- $tls := .secret }}
scheme: https
tlsConfig:
  serverName: {{ .server }}
  ca: {secret: {name: {{ $tls }}, key: ca.pem}}
  cert: {secret: {name: {{ $tls }}, key: certificate.pem}}
  keySecret: {name: {{ $tls }}, key: key.pem}
{{- end }}
