"""The chart: what it renders to is what Kubernetes' API takes, hardened, and fits the settings of the gateway.

No package of Helm is to be had from the registries; tests/deploy/gotemplate.py renders what the chart uses of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.cli import app
from proxy.settings import Settings, load_settings
from tests.deploy.gotemplate import Chart, TemplateError, parse

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "burstgate"
SOURCES = {path.name: path.read_text() for path in sorted((CHART / "templates").iterdir())}
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
META: dict[str, Any] = yaml.safe_load((CHART / "Chart.yaml").read_text())
EVERYTHING: dict[str, Any] = {
    "imagePullSecrets": [{"name": "pull"}],
    "secretFiles": [{"secret": "upstream-keys", "mountPath": "/etc/burstgate/keys"}],
    "secretEnvironment": ["more-keys"],
    "persistence": {"storageClass": "fast"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "vllm"}}}], "ports": [{"port": 8000}]}],
    },
    "replay": {
        "enabled": True, "model": "llama", "startAt": "2026-11-21T20:00:00Z", "arguments": ["--slo", "ttft=0.5"],
        "traceVolume": {"configMap": {"name": "trace"}},
    },
    "service": {"annotations": {"a": "b"}},
    "serviceAccount": {"annotations": {"a": "b"}},
    "podLabels": {"a": "b"},
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "high",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": EVERYTHING,
    "without volumes": {"persistence": {"enabled": False}, "autoscaling": {"enabled": True}},
    "little": {
        "migration": {"enabled": False}, "networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False},
    },
}  # fmt: skip


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Values over values, as Helm lays them: mappings join, all else is replaced."""
    result = copy.deepcopy(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def render(more: dict[str, Any], release: str = "site") -> list[dict[str, Any]]:
    root = {
        "Values": merged(VALUES, more),
        "Release": {"Name": release, "Namespace": "ns", "Service": "Helm"},
        "Chart": {"Name": META["name"], "Version": META["version"], "AppVersion": META["appVersion"]},
    }
    texts = Chart(SOURCES).render(root)
    return [
        item
        for name, text in texts.items()
        if name.endswith(".yaml")
        for item in yaml.safe_load_all(text)
        if item is not None
    ]


RENDERED = {name: render(more) for name, more in VARIANTS.items()}
ITEMS = [
    pytest.param(item, id=f"{name}: {item['kind']} {item['metadata']['name']}")
    for name, items in RENDERED.items()
    for item in items
]


def pick(variant: str, kind: str, suffix: str = "") -> dict[str, Any]:
    (found,) = (
        item
        for item in RENDERED[variant]
        if item["kind"] == kind and item["metadata"]["name"] == f"site-burstgate{suffix}"
    )
    return found


def pod_of(item: dict[str, Any]) -> dict[str, Any] | None:
    spec: dict[str, Any] | None = item.get("spec", {}).get("template", {}).get("spec")
    return spec


def containers(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pod = pod_of(item) or {}
    yield from pod.get("initContainers", [])
    yield from pod.get("containers", [])


def test_what_is_rendered() -> None:
    kinds = {name: sorted(item["kind"] for item in items) for name, items in RENDERED.items()}
    base = ["ConfigMap", "Service", "Service", "ServiceAccount"]
    more = ["HorizontalPodAutoscaler", "Job", "ServiceMonitor"]
    assert kinds == {
        "default": sorted([*base, "StatefulSet", "PodDisruptionBudget", "NetworkPolicy", "Job"]),
        "everything": sorted([*base, "StatefulSet", "PodDisruptionBudget", "NetworkPolicy", "Job", *more]),
        "without volumes": sorted(
            [*base, "Deployment", "PodDisruptionBudget", "NetworkPolicy", "Job", "HorizontalPodAutoscaler"]
        ),
        "little": sorted([*base, "StatefulSet"]),
    }


@pytest.mark.parametrize("item", ITEMS)
def test_kubernetes_takes_it(item: dict[str, Any]) -> None:
    if item["kind"] == "ServiceMonitor":
        pytest.skip("a custom resource, of which Kubernetes itself has no schema")
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    validate.validate(item, "1.29", strict=True)  # the oldest that the chart is for


@pytest.mark.parametrize("item", [item for item in ITEMS if pod_of(item.values[0])])  # type: ignore[arg-type]
def test_pods_are_hardened(item: dict[str, Any]) -> None:
    pod = pod_of(item)
    assert pod is not None
    assert pod["automountServiceAccountToken"] is False
    # With links, a Service named burstgate makes BURSTGATE_PORT=tcp://..., which is a setting's name.
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(item):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "/data" in {mount["mountPath"] for mount in container["volumeMounts"]}
    there = {volume["name"] for volume in pod["volumes"]}
    there |= {claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])}
    assert {mount["name"] for container in containers(item) for mount in container["volumeMounts"]} <= there


@pytest.mark.parametrize("item", [item for item in ITEMS if pod_of(item.values[0])])  # type: ignore[arg-type]
def test_containers_run_commands_that_exist_with_settings_that_exist(item: dict[str, Any], tmp_path: Path) -> None:
    import typer.main

    for container in containers(item):
        command: Any = typer.main.get_command(app)
        words = list(container["args"])
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= flags
        environment = {
            each["name"]: each.get("value", "x") for each in container["env"] if each["name"].startswith("BURSTGATE_")
        }
        settings = load_settings(environment=environment).settings
        if container["name"] == "gateway":
            assert settings.recorder is False
            assert settings.timeouts.drain_s == VALUES["drainSeconds"]


def test_configuration_is_one_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "burstgate.yaml"
    path.write_text(pick("default", "ConfigMap")["data"]["burstgate.yaml"])
    settings = load_settings(config=path, environment={}).settings
    assert [str(upstream) for upstream in settings.upstreams] == VALUES["config"]["upstreams"]


def test_a_pod_has_time_to_stop() -> None:
    pod = pod_of(pick("default", "StatefulSet"))
    assert pod is not None
    # preStop, requests in flight, workers' end, control plane, recorder.
    assert pod["terminationGracePeriodSeconds"] > 5 + Settings().timeouts.drain_s + 5 + 5 + 30


def test_the_journal_fits_its_volume() -> None:
    from pydantic import ByteSize, TypeAdapter

    claim = pick("default", "StatefulSet")["spec"]["volumeClaimTemplates"][0]["spec"]
    sizes = TypeAdapter(ByteSize)
    size = sizes.validate_python(claim["resources"]["requests"]["storage"].replace("Gi", "GiB"))
    assert sizes.validate_python(VALUES["persistence"]["journalBudget"]) <= 0.9 * size
    assert pod_of(pick("without volumes", "Deployment"))["volumes"][-1] == {  # type: ignore[index]
        "name": "data",
        "emptyDir": {"sizeLimit": "10Gi"},
    }


def test_selectors_find_the_pods() -> None:
    for variant in VARIANTS:
        gateway = next(item for item in RENDERED[variant] if item["kind"] in ("StatefulSet", "Deployment"))
        labels = gateway["spec"]["template"]["metadata"]["labels"].items()
        for item in RENDERED[variant]:
            spec = item.get("spec", {})
            for selector in (
                spec.get("selector", {}).get("matchLabels") if item["kind"] != "ServiceMonitor" else None,
                spec.get("selector") if item["kind"] == "Service" else None,
                spec.get("podSelector", {}).get("matchLabels"),
            ):
                assert (selector or {}).items() <= labels, item["kind"]
    monitor = pick("everything", "ServiceMonitor")
    service = pick("everything", "Service", "-control")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert [end["port"] for end in monitor["spec"]["endpoints"]] == [port["name"] for port in service["spec"]["ports"]]


def test_a_replay_has_a_shard_a_pod() -> None:
    from replay.options import parse_shard

    spec = pick("everything", "Job", "-replay")["spec"]
    (shard,) = (
        word.removeprefix("--shard=")
        for word in spec["template"]["spec"]["containers"][0]["args"]
        if word.startswith("--shard=")
    )
    assert spec["completionMode"] == "Indexed"
    shards = [parse_shard(shard.replace("$(JOB_COMPLETION_INDEX)", str(i)), {}) for i in range(spec["completions"])]
    assert [shard.index for shard in shards] == list(range(spec["parallelism"]))


# The values' schema ---------------------------------------------------------------------------------------------------


def problems(more: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with kubernetes-validate")
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    found = jsonschema.Draft7Validator(schema).iter_errors(merged(VALUES, more))
    return [".".join(map(str, error.absolute_path)) for error in found]


@pytest.mark.parametrize("name", VARIANTS)
def test_values_fit_their_schema(name: str) -> None:
    assert problems(VARIANTS[name]) == []


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"replica": 2}, ""),
        ({"replicas": "2"}, "replicas"),
        ({"config": {"upstreams": []}}, "config.upstreams"),
        ({"config": {"database_url": "postgresql://u:secret@h/n"}}, "config"),  # secrets are no values
        ({"persistence": {"size": "10 GB"}}, "persistence.size"),
        ({"replay": {"enabled": True, "model": "m"}}, "replay.startAt"),
        ({"replay": {"enabled": True, "model": "m", "startAt": "tomorrow"}}, "replay.startAt"),
        ({"secretFiles": [{"secret": "s", "mountPath": "keys"}]}, "secretFiles.0.mountPath"),
        ({"service": {"port": 0}}, "service.port"),
    ],
)
def test_values_that_are_wrong_are_refused(more: dict[str, Any], place: str) -> None:
    assert problems(more) == [place]


def test_every_value_has_a_schema_and_a_use() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) - {"global"} == set(VALUES)
    text = "".join(SOURCES.values())
    assert [key for key in VALUES if f".Values.{key}" not in text] == []


# The renderer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a {{- .x }} b", "a1 b"),
        ("a {{ .x -}} b", "a 1b"),
        ("{{ if .no }}a{{ else if .x }}b{{ else }}c{{ end }}", "b"),
        ("{{ if .no }}a{{ else }}c{{ end }}", "c"),
        ("{{ with .m }}{{ .k }}{{ $.x }}{{ end }}{{ with .no }}z{{ end }}", "v1"),
        ("{{ range .l }}<{{ . }}>{{ end }}", "<1><2>"),
        ('{{ default "d" .no | quote }}', '"d"'),
        ('{{ printf "%s-%v" "a" .x | trunc 2 }}', "a-"),
        ("{{ add (int .x) 60 }}", "61"),
        ("x:{{ toYaml .m | nindent 2 }}", "x:\n  k: v"),
        ('{{ define "t" }}[{{ .k }}]{{ end }}{{ include "t" .m }}', "[v]"),
        ("{name: {{ .x | quote }}}", '{name: "1"}'),
        ("{{/* nothing */}}a{{- /* nothing */ -}} b", "ab"),
    ],
)
def test_renderer(source: str, text: str) -> None:
    root = {"x": 1, "no": "", "m": {"k": "v"}, "l": [1, 2]}
    assert Chart({"t": source}).render(root) == {"t": text}


@pytest.mark.parametrize("source", ["{{ if .x }}a", "a{{ end }}"])
def test_renderer_refuses_what_does_not_end(source: str) -> None:
    with pytest.raises(TemplateError):
        parse(source)


@pytest.mark.parametrize(
    "source", ["{{ lookup .x }}", "{{ .x.y.z }}", "{{ .x ) }}", '{{ required "no" .no }}', "{{ $v }}"]
)
def test_renderer_refuses_what_it_does_not_know(source: str) -> None:
    with pytest.raises(TemplateError):
        Chart({"t": source}).render({"x": {}, "no": ""} if "y" not in source else {"x": {"y": 1}})
