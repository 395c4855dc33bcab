{{- /* The names of all objects begin with this: the release's name, with "lamina" unless it says so itself. */}}
{{- define "lamina.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-lamina" .Release.Name) (contains "lamina" .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "lamina.selector" -}}
app.kubernetes.io/name: lamina
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lamina.labels" -}}
{{ include "lamina.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "lamina.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "lamina.apiKeySecret" -}}
{{ .Values.apiKey.secretName | default (printf "%s-api-key" (include "lamina.fullname" .)) }}
{{- end }}

{{- define "lamina.tlsSecret" -}}
{{ .Values.tls.secretName | default (printf "%s-tls" (include "lamina.fullname" .)) }}
{{- end }}

{{- /* The domain of the attention pods: pod N is <fullname>-attention-N there. */}}
{{- define "lamina.attentionDomain" -}}
{{ include "lamina.fullname" . }}-attention.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end }}

{{- /* Options as words of a command line: {a: 1, b: true, c: [x, y]} is --a=1 --b --c=x --c=y. JSON keeps large numbers
whole, which Helm reads as floats. */}}
{{- define "lamina.words" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s" $name | quote }}
{{- else }}
{{- range (kindIs "slice" $value | ternary $value (list $value)) }}
- {{ printf "--%s=%s" $name (kindIs "string" . | ternary . (toJson .)) | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "lamina.container" -}}
image: {{ include "lamina.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "lamina.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: # the image's user
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "lamina.apiKeyEnv" -}}
- name: LAMINA_API_KEY
  valueFrom: {secretKeyRef: {name: {{ include "lamina.apiKeySecret" . }}, key: api-key}}
{{- end }}
