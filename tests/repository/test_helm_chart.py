"""docs/helm/lamina, rendered by Helm's library: every command, option, path, port and name in it exists, pods find each
other, and values that are not allowed are refused."""

from __future__ import annotations

import base64
import json
import ssl
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import lamina
from lamina.ray_cluster.connection import ATTENTION, MODEL
from lamina.server.ray_serve import DEPLOYMENT, ServePlan
from lamina.system.child_process import KEY_VARIABLE
from lamina_protocols.channels.channels import split_address
from lamina_workers.process.credentials import load_credentials
from tests.repository.test_deploy_files import parse, paths, provided
from tests.support.helm import CHART, render

pytest.importorskip("helm_python", reason="helm-python-sdk renders the chart")

GOOD: dict[str, Any] = {
    "defaults": {},
    "options": {"server": {"options": {"max-requests": 2_097_152, "no-journal": True, "attention-workers": 2}}},
    "attention pods": {"attention": {"replicas": 3, "options": {"kv-memory": "200GiB"}}},
    "own secrets": {"attention": {"replicas": 1}, "apiKey": {"secretName": "mine"}, "tls": {"secretName": "also"}},
    "kuberay": {
        "kuberay": {"enabled": True},
        "attention": {"replicas": 4},
        "server": {"options": {"shard": "heads", "max-requests": 1024}},
    },
}
BAD: dict[str, tuple[Any, str]] = {
    "unknown value": ({"replicas": 2}, "'replicas' not allowed"),
    "option with dashes": ({"server": {"options": {"--kv-memory": "8GiB"}}}, "propertyName '--kv-memory'"),
    "option of the chart's own": ({"server": {"options": {"port": 1}}}, "propertyName 'port'"),
    "a key in an option": ({"server": {"options": {"api-key": "k"}}}, "propertyName 'api-key'"),
    "less than none": ({"attention": {"replicas": -1}}, "/attention/replicas"),
    "workers twice": (
        {"attention": {"replicas": 1}, "server": {"options": {"attention-workers": 2}}},
        "allowed is one of the two",
    ),
    "kuberay without workers": ({"kuberay": {"enabled": True}}, "at least 1 is allowed"),
    "kuberay with options of workers": (
        {"kuberay": {"enabled": True}, "attention": {"replicas": 1, "options": {"kv-memory": "1GiB"}}},
        "the server's options say",
    ),
}


@cache
def rendered() -> tuple[dict[str, Any], list[Any]]:
    return render(GOOD | {name: values for name, (values, _) in BAD.items()})


def objects(case: str) -> dict[tuple[str, str], Any]:
    """By kind and name."""
    found = rendered()[0][case]
    assert not isinstance(found, str), found
    named = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert len(named) == len(found)
    return named


def decoded(secret: Any) -> dict[str, bytes]:
    return {name: base64.b64decode(value) for name, value in secret["data"].items()}


def test_the_linter_has_no_complaint_and_the_versions_are_those_of_lamina() -> None:
    assert [message for message in rendered()[1] if "icon" not in message["error"]] == []
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == lamina.__version__


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_allowed_is_refused(case: str) -> None:
    assert BAD[case][1] in rendered()[0][case]


@pytest.mark.parametrize("case", ["defaults", "options", "attention pods", "own secrets"])
def test_the_server_runs_a_command_that_exists(case: str) -> None:
    found = objects(case)
    pod = found["Deployment", "chat-lamina"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    context = parse(container["args"])
    assert context.info_name == "serve"
    assert pod["terminationGracePeriodSeconds"] > context.params["drain_timeout"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "GET" in paths()[container[name]["httpGet"]["path"]]
    [port] = container["ports"]
    assert port["containerPort"] == context.params["port"]
    service = found["Service", "chat-lamina"]["spec"]
    assert service["ports"][0]["targetPort"] == port["name"]
    labels = found["Deployment", "chat-lamina"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    policy = found["NetworkPolicy", "chat-lamina"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["ingress"][0]["ports"] == [{"port": context.params["port"]}]
    key = container["env"][0]
    assert key["name"] == KEY_VARIABLE
    secret = key["valueFrom"]["secretKeyRef"]
    if case == "own secrets":
        assert secret["name"] == "mine"
        assert [name for kind, name in found if kind == "Secret"] == []
    else:
        assert len(decoded(found["Secret", secret["name"]])[secret["key"]]) >= 32
    mounted = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == mounted.keys()
    claim = mounted["cache"]["persistentVolumeClaim"]["claimName"]
    assert ("PersistentVolumeClaim", claim) in found
    if case == "options":
        assert context.params["max_requests"] == 2_097_152  # Helm's numbers are floats
        assert context.params["no_journal"]
        assert context.params["attention_workers"] == ["2"]


def test_the_server_reaches_every_attention_pod_and_trusts_it(tmp_path: Path) -> None:
    found = objects("attention pods")
    workers = found["StatefulSet", "chat-lamina-attention"]["spec"]
    server = found["Deployment", "chat-lamina"]["spec"]["template"]["spec"]
    pod = workers["template"]["spec"]
    [container] = pod["containers"]
    context = parse(container["args"])
    assert context.info_name == "attention-worker"
    assert context.params["kv_memory"] == "200GiB"
    asked = parse(server["containers"][0]["args"]).params
    headless = found["Service", workers["serviceName"]]
    domain = f"{headless['metadata']['name']}.models.svc.cluster.local"
    hosts = [f"chat-lamina-attention-{at}.{domain}" for at in range(workers["replicas"])]
    port = int(context.params["listen"].rpartition(":")[2])
    assert [split_address(address) for address in asked["attention_workers"]] == [(host, port) for host in hosts]
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["selector"].items() <= workers["template"]["metadata"]["labels"].items()
    assert {each["containerPort"] for each in container["ports"]} == {port, context.params["data_port"]}
    assert {each["port"] for each in headless["spec"]["ports"]} == {port, context.params["data_port"]}

    secrets = decoded(found["Secret", "chat-lamina-tls"])
    for name, content in secrets.items():
        (tmp_path / name).write_bytes(content)
    [shown] = [volume["secret"] for volume in server["volumes"] if "secret" in volume]
    assert {item["key"] for item in shown["items"]} == {"ca.pem", "token"} < secrets.keys()
    load_credentials(tmp_path, tmp_path / "token", server=True)
    for host in hosts:
        shake_hands(tmp_path, host)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, "chat-lamina.models.svc.cluster.local")


def shake_hands(folder: Path, host: str) -> None:
    """TLS between a client that wants `host` and a server with the folder's certificate."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    ours = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ours.wrap_bio(to_client, to_server, server_hostname=host)
    server = theirs.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_the_ray_service_is_that_of_the_manifest() -> None:
    found = objects("kuberay")
    assert {kind for kind, _ in found} == {"RayService", "Secret", "NetworkPolicy"}
    spec, policy = found["RayService", "chat-lamina"]["spec"], found["NetworkPolicy", "chat-lamina"]["spec"]
    [manifest, _] = yaml.safe_load_all((CHART.parents[1] / "rayservice.yaml").read_text())
    expected = manifest["spec"]["rayClusterConfig"]
    cluster = spec["rayClusterConfig"]
    assert {name: cluster[name] for name in ("rayVersion", "authOptions")} == {
        name: expected[name] for name in ("rayVersion", "authOptions")
    }
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for ours, theirs in ((head, expected["headGroupSpec"]), (workers, expected["workerGroupSpecs"][0])):
        assert provided(ours) == provided(theirs)
        assert ours["rayStartParams"]["num-cpus"] == theirs["rayStartParams"]["num-cpus"]
        [container] = ours["template"]["spec"]["containers"]
        [wanted] = theirs["template"]["spec"]["containers"]
        for name in ("name", "image", "ports", "readinessProbe", "resources"):
            assert container.get(name) == wanted.get(name), name
        assert policy["podSelector"]["matchLabels"].items() <= ours["template"]["metadata"]["labels"].items()
    config, wanted = yaml.safe_load(spec["serveConfigV2"]), yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert config == wanted
    assert config["applications"][0]["deployments"][0]["name"] == DEPLOYMENT
    plan = ServePlan.read(config["applications"][0]["args"])
    assert provided(workers)[ATTENTION] * workers["replicas"] == plan.config.attention_workers
    assert provided(head)[MODEL] == 1
    assert head["template"]["spec"]["terminationGracePeriodSeconds"] > plan.drain_timeout


def test_every_value_is_in_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    known = schema["properties"].keys() - {"global"}
    assert known == values.keys() == set(schema["required"])
    for name in known:
        if "properties" in schema["properties"][name]:
            assert schema["properties"][name]["properties"].keys() == values[name].keys(), name
