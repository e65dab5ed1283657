"""deploy/k8s/base: schemas, and what schemas cannot see."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.repository import ROOT, SERVICES, TORCH_SERVICES
from tests.support.service_settings import settings_class, variables

BASE = ROOT / "deploy" / "k8s" / "base"
VERSION = "1.32"
WORKLOADS = {"Deployment", "StatefulSet"}
# After its drain a process stops its server (10 s at most) and leaves (5 s at most).
AFTER_DRAIN_S = 15.0
# A worker with the demo model, without its KV cache, takes 470 MB.
WORKER_BYTES = 768 << 20
Resource = dict[str, Any]


def _kustomization() -> Resource:
    return yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))


def _load() -> list[Resource]:
    return [
        document
        for name in _kustomization()["resources"]
        for document in yaml.safe_load_all((BASE / name).read_text(encoding="utf-8"))
    ]


RESOURCES = _load()


def _of(*kinds: str) -> list[Resource]:
    return [resource for resource in RESOURCES if resource["kind"] in kinds]


def _name(resource: Resource) -> str:
    return f"{resource['kind']}/{resource['metadata']['name']}"


def _pods() -> list[tuple[str, Resource]]:
    """(workload's name, pod template) pairs."""
    return [(_name(resource), resource["spec"]["template"]) for resource in _of(*WORKLOADS)]


def _selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def test_lists_every_file() -> None:
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(_kustomization()["resources"])


def test_names_are_unique() -> None:
    names = [_name(resource) for resource in RESOURCES]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("resource", RESOURCES, ids=_name)
def test_follows_its_schema(resource: Resource) -> None:
    kubernetes_validate.validate(resource, VERSION, strict=True)


def test_the_schema_check_finds_a_wrong_key() -> None:
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_selectors_select() -> None:
    pods = [template["metadata"]["labels"] for _, template in _pods()]
    for workload in _of(*WORKLOADS):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert _selects(workload["spec"]["selector"]["matchLabels"], labels), _name(workload)
    for service in _of("Service"):
        chosen = [labels for labels in pods if _selects(service["spec"]["selector"], labels)]
        assert len(chosen) == 1, _name(service)
    for budget in _of("PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        assert len([labels for labels in pods if _selects(selector, labels)]) == 1, _name(budget)


def _all_ports() -> list[tuple[str, int]]:
    found = [
        (name, port["containerPort"])
        for name, template in _pods()
        for container in template["spec"]["containers"]
        for port in container["ports"]
    ]
    found += [
        (_name(service), port["port"])
        for service in _of("Service")
        for port in service["spec"]["ports"]
    ]
    found += [
        (_name(policy), port["port"])
        for policy in _of("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for port in rule["ports"]
    ]
    return found


def test_ports_are_in_range() -> None:
    assert _all_ports()
    assert [(name, port) for name, port in _all_ports() if not 1 <= port <= 65535] == []


def test_port_names_exist() -> None:
    for service in _of("Service"):
        (template,) = [
            template
            for _, template in _pods()
            if _selects(service["spec"]["selector"], template["metadata"]["labels"])
        ]
        names = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        wanted = {port["targetPort"] for port in service["spec"]["ports"]}
        assert wanted <= names, _name(service)


def test_references_exist() -> None:
    known = {_name(resource) for resource in RESOURCES}
    for name, template in _pods():
        pod = template["spec"]
        assert f"ServiceAccount/{pod['serviceAccountName']}" in known, name
        for container in pod["containers"]:
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert f"ConfigMap/{source['configMapRef']['name']}" in known, name
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            claims = {"data"} if "nats" in name or "cache" in name else set()
            assert mounts == volumes | claims, name
    for scaler in _of("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert f"{target['kind']}/{target['name']}" in known, _name(scaler)
        assert scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]
    for workload in _of("StatefulSet"):
        assert f"Service/{workload['spec']['serviceName']}" in known


def test_keys_come_from_one_secret_of_the_users_own() -> None:
    sources = {
        container["name"]: [source["secretRef"] for source in container.get("envFrom", [])
                            if "secretRef" in source]
        for _, template in _pods()
        for container in template["spec"]["containers"]
    }  # fmt: skip
    keys = {"name": "baton-keys", "optional": True}
    assert {name: found for name, found in sources.items() if found} == {
        "gateway": [keys], "scheduler": [keys]
    }  # fmt: skip
    assert not _of("Secret")
    text = (BASE / "kustomization.yaml").read_text(encoding="utf-8")
    (named,) = re.findall(r"create secret generic (\S+) ", text)
    assert named == keys["name"]
    for service in ("gateway", "scheduler"):
        literals = set(re.findall(r"--from-literal=(\w+)=", text))
        assert literals == {"BATON_API_KEYS", "BATON_GATEWAY_KEY"} <= variables(service)


def test_autoscaled_workloads_do_not_fix_their_replicas() -> None:
    scaled = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in _of("HorizontalPodAutoscaler")}
    assert {"baton-prefill", "baton-decode"} <= scaled
    fixed = {
        workload["metadata"]["name"]
        for workload in _of(*WORKLOADS)
        if "replicas" in workload["spec"]
    }
    assert scaled & fixed == set()


def test_pods_run_unprivileged() -> None:
    for name, template in _pods():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        # A Service named baton-http would set the gateway's BATON_HTTP_PORT to "tcp://...".
        assert pod["enableServiceLinks"] is False, name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name


def test_every_role_has_its_workload_and_an_address_per_replica() -> None:
    components = {
        template["metadata"]["labels"]["app.kubernetes.io/component"] for _, template in _pods()
    }
    assert components == {*SERVICES, "nats"}
    headless = {
        service["spec"]["selector"]["app.kubernetes.io/component"]
        for service in _of("Service")
        if service["spec"].get("clusterIP") == "None"
    }
    assert headless == components


def _environment(service: str) -> dict[str, str]:
    maps = {resource["metadata"]["name"]: resource["data"] for resource in _of("ConfigMap")}
    (container,) = [
        container
        for _, template in _pods()
        for container in template["spec"]["containers"]
        if container["name"] == service
    ]
    given: dict[str, str] = {}
    used_only_by_reference: set[str] = set()
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            given |= maps[source["configMapRef"]["name"]]
    for entry in container["env"]:
        # A value from the pod itself is its address.
        value = entry.get("value", "10.0.0.1")
        referenced = re.findall(r"\$\((\w+)\)", value)
        given[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda name: given[name[1]], value)
        used_only_by_reference.update(referenced)
    return {
        name: value
        for name, value in given.items()
        if name not in used_only_by_reference or name in variables(service)
    }


@pytest.mark.parametrize("service", SERVICES)
def test_every_variable_is_a_setting_with_a_good_value(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = _environment(service)
    assert environment.pop("SERVICE") == service
    assert environment.pop("GRPC_VERBOSITY") == "NONE"
    assert environment.pop("HF_HUB_DISABLE_PROGRESS_BARS") == "1"
    assert set(environment) - variables(service) == set()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = settings_class(service)()
    template = next(
        template
        for _, template in _pods()
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == service
    )
    container = template["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (settings.port, settings.metrics_port) == (ports["grpc"], ports["metrics"])
    assert settings.health_port == ports["health"], "probes cannot speak TLS"
    assert container["readinessProbe"]["grpc"]["port"] == settings.health_port
    assert container["startupProbe"]["grpc"]["port"] == settings.health_port
    grace_s = template["spec"]["terminationGracePeriodSeconds"]
    pre_stop_s = (
        container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    )
    end_s = pre_stop_s + settings.drain_grace_s + AFTER_DRAIN_S
    assert end_s <= grace_s, "the drain would be cut off by SIGKILL"
    assert service != "gateway" or pre_stop_s > 0, "its Service learns late that a pod ends"


@pytest.mark.parametrize("service", TORCH_SERVICES)
def test_workers_take_what_their_pod_is_given(service: str) -> None:
    """A pod sees all cores of its node; and a KV cache that fills must not meet the limit."""
    environment = _environment(service)
    resources = next(
        template["spec"]["containers"][0]["resources"]
        for _, template in _pods()
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == service
    )
    assert environment["BATON_NUM_THREADS"] == resources["requests"]["cpu"]
    limit = re.fullmatch(r"(\d+)Gi", resources["limits"]["memory"])
    assert limit is not None
    assert int(environment["BATON_KV_BYTES"]) + WORKER_BYTES <= int(limit[1]) << 30


def test_model_paths_of_the_manifests_are_in_the_image() -> None:
    (model,) = [r for r in _of("ConfigMap") if r["metadata"]["name"] == "baton-model"]
    for name, value in model["data"].items():
        if value.startswith("/models/"):
            assert (ROOT / "deploy" / value.lstrip("/") / "config.json").is_file(), name


def test_network_policies_name_real_components_and_open_ports() -> None:
    by_component = {
        template["metadata"]["labels"]["app.kubernetes.io/component"]: {
            port["containerPort"]
            for container in template["spec"]["containers"]
            for port in container["ports"]
        }
        for _, template in _pods()
    }
    for policy in _of("NetworkPolicy"):
        chosen = policy["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
        for rule in policy["spec"].get("ingress", []):
            for port in rule["ports"]:
                roles = [chosen] if chosen else SERVICES
                assert all(port["port"] in by_component[role] for role in roles), _name(policy)
            for source in rule.get("from", []):
                for match in source.get("podSelector", {}).get("matchExpressions", []):
                    if match["key"] == "app.kubernetes.io/component":
                        assert set(match["values"]) <= set(by_component), _name(policy)


def test_cache_keeps_its_blocks_on_a_claim_of_its_own() -> None:
    (cache,) = [r for r in _of("StatefulSet") if r["metadata"]["name"] == "baton-cache"]
    (claim,) = cache["spec"]["volumeClaimTemplates"]
    (container,) = cache["spec"]["template"]["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    environment = _environment("cache")
    assert environment["BATON_DISK_PATH"] == mounts[claim["metadata"]["name"]]
    size = claim["spec"]["resources"]["requests"]["storage"]
    assert size.endswith("Gi")
    assert int(environment["BATON_DISK_BYTES"]) < int(size.removesuffix("Gi")) << 30
