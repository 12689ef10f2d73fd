{{- define "oncofed.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "oncofed.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "oncofed.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* One container of the server: dict "root" $ "part" NAME "health" PORT */ -}}
{{- define "oncofed.container" -}}
- name: {{ .part }}
  image: {{ include "oncofed.image" .root | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args: [server, start, /consortium, --state, /state, --only, {{ .part }}, --log-to-stdout, --health, "[::]:{{ .health }}"]
  env:
    - {name: FLWR_HOME, value: /state/flower}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
  ports:
    - {name: health-{{ .part }}, containerPort: {{ .health }}}
    {{- if eq .part "edge" }}
    - {name: fleet, containerPort: {{ .root.Values.port }}}
    {{- end }}
  startupProbe:
    grpc: {port: {{ .health }}}
    failureThreshold: 30
    periodSeconds: 5
  livenessProbe:
    grpc: {port: {{ .health }}}
    periodSeconds: 20
    timeoutSeconds: 5
  readinessProbe:
    grpc: {port: {{ .health }}, service: ready}
    periodSeconds: 10
    timeoutSeconds: 5
  resources: {{ index .root.Values.resources .part | toYaml | nindent 4 }}
  volumeMounts:
    - {name: consortium, mountPath: /consortium, readOnly: true}
    - {name: state, mountPath: /state}
    - {name: temporary, mountPath: /tmp}
    {{- if ne .part "edge" }}
    - {name: results, mountPath: /results}
    {{- end }}
{{- end }}
