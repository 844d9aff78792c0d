{{- define "burstgate.name" -}}
{{- if contains "burstgate" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-burstgate" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "burstgate.selector" -}}
app.kubernetes.io/name: burstgate
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "burstgate.labels" -}}
{{ include "burstgate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "burstgate.image" -}}
{{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) | quote }}
{{- end }}

{{- define "burstgate.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "burstgate.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "burstgate.databaseUrl" -}}
- name: BURSTGATE_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.database.secret }}
      key: {{ .Values.database.key }}
{{- end }}

{{- /* The pod, the same in a StatefulSet and in a Deployment. */ -}}
{{- define "burstgate.pod" -}}
metadata:
  labels:
    {{- include "burstgate.selector" . | nindent 4 }}
    app.kubernetes.io/component: gateway
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # Another configuration is another pod.
    checksum/config: {{ toYaml .Values.config | sha256sum | quote }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "burstgate.name" . }}
  automountServiceAccountToken: false
  # Off: a Service named burstgate would put BURSTGATE_PORT=tcp://... into the environment, which is a setting's name.
  enableServiceLinks: false
  # preStop 5 s, requests in flight, 5 s for the workers' end and 5 s for the control plane's, 30 s for the recorder.
  terminationGracePeriodSeconds: {{ add (int .Values.drainSeconds) 60 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- include "burstgate.podSecurity" . | nindent 4 }}
  initContainers:
    # The recorder is a sidecar: it starts before the gateway and ends after it, when the journal is complete.
    - name: recorder
      image: {{ include "burstgate.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      restartPolicy: Always
      args: [record, --config, /etc/burstgate/burstgate.yaml]
      env:
        {{- include "burstgate.databaseUrl" . | nindent 8 }}
      securityContext:
        {{- include "burstgate.containerSecurity" . | nindent 8 }}
      resources:
        {{- toYaml .Values.recorder.resources | nindent 8 }}
      volumeMounts:
        - {name: data, mountPath: /data}
        - {name: config, mountPath: /etc/burstgate/burstgate.yaml, subPath: burstgate.yaml, readOnly: true}
        {{- range .Values.secretFiles }}
        - {name: {{ .secret | quote }}, mountPath: {{ .mountPath | quote }}, readOnly: true}
        {{- end }}
  containers:
    - name: gateway
      image: {{ include "burstgate.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve, --config, /etc/burstgate/burstgate.yaml]
      env:
        - {name: BURSTGATE_RECORDER, value: "false"}
        - {name: BURSTGATE_CONTROL_HOST, value: 0.0.0.0}
        - {name: BURSTGATE_CONTROL__TOKENS_FILE, value: /etc/burstgate/control/tokens}
        - {name: BURSTGATE_TIMEOUTS__DRAIN_S, value: {{ .Values.drainSeconds | quote }}}
        - {name: BURSTGATE_JOURNAL__BUDGET, value: {{ .Values.persistence.journalBudget | quote }}}
        - name: BURSTGATE_GATEWAY
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        {{- include "burstgate.databaseUrl" . | nindent 8 }}
      {{- with .Values.secretEnvironment }}
      envFrom:
        {{- range . }}
        - secretRef: {name: {{ . | quote }}}
        {{- end }}
      {{- end }}
      ports:
        - {name: http, containerPort: 8080}
        - {name: control, containerPort: 8081}
      # The control plane answers once all processes are ready. After that only the listening socket counts: a control
      # plane in trouble must not take away a data plane that works, and an upstream in trouble is no reason to restart.
      startupProbe:
        httpGet: {path: /healthz, port: control}
        periodSeconds: 2
        failureThreshold: 60
      readinessProbe:
        tcpSocket: {port: http}
        periodSeconds: 5
      livenessProbe:
        tcpSocket: {port: http}
        periodSeconds: 20
        failureThreshold: 3
      lifecycle:
        preStop:
          exec:
            command: [sleep, "5"]     # until no balancer sends new connections
      securityContext:
        {{- include "burstgate.containerSecurity" . | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - {name: data, mountPath: /data}
        - {name: config, mountPath: /etc/burstgate/burstgate.yaml, subPath: burstgate.yaml, readOnly: true}
        - {name: control, mountPath: /etc/burstgate/control, readOnly: true}
        {{- range .Values.secretFiles }}
        - {name: {{ .secret | quote }}, mountPath: {{ .mountPath | quote }}, readOnly: true}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "burstgate.name" . }}
    - name: control
      secret:
        secretName: {{ .Values.control.secret }}
    {{- range .Values.secretFiles }}
    - name: {{ .secret | quote }}
      secret:
        secretName: {{ .secret | quote }}
    {{- end }}
    {{- if not .Values.persistence.enabled }}
    - name: data
      emptyDir:
        sizeLimit: {{ .Values.persistence.size }}
    {{- end }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "burstgate.selector" . | nindent 10 }}
          app.kubernetes.io/component: gateway
    - maxSkew: 1
      topologyKey: topology.kubernetes.io/zone
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "burstgate.selector" . | nindent 10 }}
          app.kubernetes.io/component: gateway
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
