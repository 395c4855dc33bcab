"""The files with which people deploy a server, and docs/serve.md: every command, option, path, route and field that
they name exists. Nothing is started."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from unobserved import NoMetrics, Unobserved

import lamina
from lamina.cli.main import app
from lamina.ray_cluster.connection import ATTENTION, MODEL
from lamina.server.app import create_app
from lamina.server.frontend import Frontend
from lamina.server.http.fields import read
from lamina.server.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
)
from lamina.server.ray_serve import DEPLOYMENT, ServePlan
from lamina.server.settings import ServerSettings
from lamina.system.child_process import KEY_VARIABLE

ROOT = Path(__file__).parents[2]
SERVE = (ROOT / "docs" / "serve.md").read_text()
USAGE_ERROR = typer.BadParameter.__mro__[1]  # typer has a copy of click, or click itself
NO_MODULES = {"lamina.bench.serve", "lamina.bench.decode"} | {  # names in results, in spans, and in a request's scope
    f"lamina.{name}" for name in ("request", "request.id", "request_id", "preemptions", "tenant")
}


def parse(words: list[str]) -> Any:
    """The context of a `lamina` command with these words, which is not run. Unknown options are click's errors."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("lamina", list(words))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context


def commands(text: str) -> Iterator[list[str]]:
    """The `lamina` commands of a text, without comments: lines that begin with one, or have one after ` -- `."""
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.search(r"(?:^| -- [# ]*)(lamina [a-z].*)", line.strip().lstrip("# ")):
            yield shlex.split(found[1], comments=True)[1:]


def is_named_right(name: str) -> bool:
    """Whether a dotted name is that of a module or package, or of something in a module."""
    path = Path(*name.split("."))
    for root in (ROOT, *(ROOT / folder for folder in ("workers", "kernels", "protocols"))):
        if any((root / each).with_suffix(".py").is_file() for each in (path, path.parent)) or (root / path).is_dir():
            return True
    return name.removeprefix("lamina.") in dir(lamina)


@cache
def paths() -> dict[str, set[str]]:
    """The methods of every route, by its path."""
    found: dict[str, set[str]] = {}
    for route in create_app(Frontend(Unobserved()), ServerSettings(model="m"), NoMetrics()).routes:
        found.setdefault(route.path, set()).update(route.methods)  # type: ignore[attr-defined]
    return found


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / name).read_text()))


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


DRAIN: float = parse(["serve"]).params["drain_timeout"]


def test_the_parser_refuses_what_does_not_exist() -> None:
    assert parse(["serve", "name", "--port=1"]).params["port"] == 1
    for words in (["serve", "--prot=1"], ["serv"], ["serve", "--port=one"], ["attention-worker", "--host=a"]):
        with pytest.raises(USAGE_ERROR):
            parse(words)


# The Dockerfile.


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for line in text.splitlines() if line for name, _, rest in [line.partition(" ")]]


def last_stage() -> dict[str, str]:
    stages = instructions()
    begin = max(index for index, (name, _) in enumerate(stages) if name == "FROM")
    return dict(stages[begin:])


def test_the_image_serves_as_nobody_special_and_looks_after_itself() -> None:
    stage = last_stage()
    entry, command = json.loads(stage["ENTRYPOINT"]), json.loads(stage["CMD"])
    assert entry == ["lamina"]
    context = parse(command)
    assert context.info_name == "serve"
    assert stage["EXPOSE"] == str(context.params["port"])
    assert stage["USER"] not in ("root", "0")
    assert stage["STOPSIGNAL"] == "SIGTERM"
    options, _, check = stage["HEALTHCHECK"].partition(" CMD ")
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", json.loads(check)[-1])
    assert url is not None
    assert (url[1], "GET" in paths()[url[2]]) == (stage["EXPOSE"], True)
    compile(json.loads(check)[-1], "HEALTHCHECK", "exec")
    assert seconds(re.search(r"--start-period=(\w+)", options)[1]) >= 600  # type: ignore[index]


def test_the_image_caches_where_lamina_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.models.cache import cache_folder

    stage = last_stage()
    variables = dict(re.findall(r"(\w+)=(\S+)", stage["ENV"]))
    monkeypatch.setenv("XDG_CACHE_HOME", variables["XDG_CACHE_HOME"])
    assert cache_folder().is_relative_to(stage["VOLUME"])
    assert any(re.search(r"install -d -o lamina .*/cache", rest) for name, rest in instructions() if name == "RUN")


def test_the_image_asks_for_what_the_project_does() -> None:
    [code] = [re.search(r'python -c "(.*?)"', rest)[1] for _, rest in instructions() if "tomllib" in rest]  # type: ignore[index]
    if sys.version_info < (3, 11):
        pytest.skip("the image has a newer Python")
    command = [sys.executable, "-c", code, "tracing"]
    wanted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(line.startswith("torch") for line in wanted) == 1
    assert any(line.startswith("grpcio") for line in wanted)
    assert any(line.startswith("opentelemetry-sdk") for line in wanted), "EXTRAS"


def test_a_wheel_can_be_made_of_what_is_let_into_the_image() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    text = (ROOT / "pyproject.toml").read_text()
    where = re.search(r"\[tool\.setuptools\.packages\.find\]\nwhere = \[(.*?)\]", text)
    assert where is not None
    packages = {name for name in re.findall(r'"(.*?)"', where[1]) if name != "."}
    readme = re.search(r'^readme = "(.*?)"', text, re.MULTILINE)
    assert readme is not None
    assert {"pyproject.toml", "lamina", "LICENSE", readme[1], *packages} <= let_in


def test_a_wheel_has_the_files_that_are_no_python() -> None:
    table = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools.package-data]")[2].partition("\n[")[0]
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, listed in re.findall(r'"([\w.*]+)" = \[(.*?)\]', table)
        for pattern in re.findall(r'"(.*?)"', listed)
    ]
    patterns = [pattern.removeprefix("*/") for pattern in patterns]
    for path in (ROOT / "lamina").rglob("*"):
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
            assert any(path.relative_to(ROOT).match(pattern) for pattern in patterns), path


# compose.yaml.


def compose() -> dict[str, Any]:
    text = (ROOT / "compose.yaml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    assert "${" not in json.dumps(loaded), "a variable without a default"
    return loaded


def test_the_containers_of_compose_run_commands_that_exist() -> None:
    content = compose()
    services = content["services"]
    contexts = {}
    for name, service in services.items():
        if "entrypoint" in service:
            words = shlex.split(service["command"][0].partition(" || ")[2])
            assert words.pop(0) == "lamina"
        else:
            words = service["command"]
        contexts[name] = parse(words)
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in content["volumes"]
        assert set(service.get("depends_on", ())) <= services.keys()
        assert set(service.get("secrets", ())) <= content["secrets"].keys()
    hosts = set(contexts["credentials"].params["host"])
    workers = contexts["server"].params["attention_workers"]
    named = {host for item in workers for host in item.split(",")}
    assert {host.partition(":")[0] for host in named} == hosts
    for host in hosts:
        listen = contexts[host].params["listen"]
        assert f"{host}:{listen.rpartition(':')[2]}" in named
        assert contexts[host].params["name"] == host
        assert f", {listen.rpartition(':')[2]})" in services[host]["healthcheck"]["test"][-1]
        assert contexts[host].params["tls_dir"] == contexts["credentials"].params["folder"]
    for name in ("lamina", "server"):
        service = services[name]
        assert seconds(service["stop_grace_period"]) > contexts[name].params["drain_timeout"] + 5
        assert str(contexts[name].params["api_key_file"]) == f"/run/secrets/{service['secrets'][0]}"
        assert service["ports"] == [f"127.0.0.1:8000:{contexts[name].params['port']}"]
    assert content["secrets"]["api_key"]["environment"] == KEY_VARIABLE


def test_services_together_share_a_profile_with_what_they_need() -> None:
    services = compose()["services"]
    for service in services.values():
        for needed in service.get("depends_on", ()):
            assert set(services[needed].get("profiles", ())) == set(service.get("profiles", ()))


# docs/rayservice.yaml.


def provided(group: dict[str, Any]) -> dict[str, int]:
    """The Ray resources of one pod of a group."""
    resources: dict[str, int] = json.loads(json.loads(group["rayStartParams"]["resources"]))
    return resources


def test_the_ray_service_names_what_exists() -> None:
    service, policy = load("docs/rayservice.yaml")
    assert (service["kind"], policy["kind"]) == ("RayService", "NetworkPolicy")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    plan = ServePlan.read(application["args"])
    [deployment] = application["deployments"]
    assert deployment["name"] == DEPLOYMENT

    cluster = service["spec"]["rayClusterConfig"]
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    has = provided(head)
    assert has[MODEL] == deployment["num_replicas"]
    assert deployment["ray_actor_options"]["resources"].items() <= has.items()
    assert provided(workers)[ATTENTION] * workers["replicas"] == plan.config.attention_workers
    pod = head["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > plan.drain_timeout
    assert pod["containers"][0]["env"][0]["name"] == KEY_VARIABLE
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": config["http_options"]["port"]}]
    for template in (head["template"], workers["template"]):
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_the_ray_cluster_has_what_its_command_asks_for() -> None:
    cluster, policy = load("docs/kuberay.yaml")
    assert (cluster["apiVersion"], cluster["kind"], policy["kind"]) == ("ray.io/v1", "RayCluster", "NetworkPolicy")
    [words] = commands((ROOT / "docs/kuberay.yaml").read_text())
    head, [workers] = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert provided(head)[MODEL] == 1
    each = provided(workers)[ATTENTION]
    assert parse(words).params["autoscale"] == f"{each * workers['minReplicas']}:{each * workers['maxReplicas']}"
    assert cluster["spec"]["enableInTreeAutoscaling"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}


@pytest.mark.parametrize("name", ["docs/kuberay.yaml", "docs/rayservice.yaml"])
def test_pods_of_other_namespaces_are_let_in_by_their_namespace_too(name: str) -> None:
    """`namespaceSelector: {}` let in every pod of the cluster that wears the operator's label, which anybody can."""
    policy = load(name)[-1]
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule.get("from", ())]
    selectors = [peer["namespaceSelector"] for peer in peers if "namespaceSelector" in peer]
    assert len(selectors) == 1
    assert set(selectors[0]["matchLabels"]) == {"kubernetes.io/metadata.name"}


@pytest.mark.real
def test_serve_understands_the_configuration_of_the_ray_service() -> None:
    pytest.importorskip("ray")
    code = f"""
import json, sys, yaml
try:
    from ray.serve.schema import ServeDeploySchema
except ImportError:
    sys.exit("no ray[serve]")
config = yaml.safe_load(open({str(ROOT / "docs" / "rayservice.yaml")!r}).read().split("\\n---\\n")[0])
ServeDeploySchema.model_validate(yaml.safe_load(config["spec"]["serveConfigV2"]))
"""  # in a process of its own: Ray's imports warn, and warnings are errors here
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if "no ray[serve]" in ran.stderr:
        pytest.skip("there is no ray[serve]")
    assert ran.returncode == 0, ran.stderr


# docs/serve.md; commands, modules and files in all of these.

MONITORING = "docs/monitoring/docker-compose.yml"
DEPLOYED = ("Dockerfile", "compose.yaml", "docs/kuberay.yaml", "docs/rayservice.yaml", MONITORING)
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS += [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("name", DEPLOYED)
def test_commands_exist(name: str) -> None:
    for words in commands((ROOT / name).read_text()):
        parse([word for word in words if word not in ("...", "&")])


def test_the_command_of_monitoring_exists() -> None:
    [compose] = load(MONITORING)
    assert parse(compose["services"]["lamina"]["command"]).info_name == "serve"


@pytest.mark.parametrize("name", [*DEPLOYED, *DOCUMENTS, "lamina", "workers", "kernels", "protocols", "scripts"])
def test_modules_and_files_named_in_a_text_exist(name: str) -> None:
    path = ROOT / name
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        text = file.read_text()
        for module in re.findall(r"(?<![\w/])lamina(?:_workers|_kernels|_protocols)?(?:\.[a-z_]\w*)+\b(?!\()", text):
            variable = file.suffix == ".py" and module.count(".") == 1  # an attribute of a variable `lamina`, perhaps
            assert variable or module in NO_MODULES or is_named_right(module), f"{file}: {module}"
        for named in re.findall(r"(?<![\w/.])(?:lamina|workers|kernels|protocols|scripts|tests)/[\w/-]+\.\w+", text):
            assert (ROOT / named).exists(), f"{file}: {named}"


def test_every_option_that_is_named_exists() -> None:
    known = {option for param in parse(["serve"]).command.params for option in (*param.opts, *param.secondary_opts)}
    others = {"--profile", "--resources", "--head", "--model", "--tasks", "--limit"}  # of docker compose, ray, lm_eval
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", SERVE))
    assert named - others - {"--help"} <= known
    for option in ("--host", "--max-requests", "--request-timeout", "--drain-timeout", "--api-key-file"):
        assert option in named


def test_every_endpoint_that_is_named_exists_and_all_are_named() -> None:
    ids = {"/models/": "{model_id:path}", "/responses/": "{response_id}", "/joining/": "{machine_id}"}
    table = SERVE.partition("## Endpoints")[2].partition("## Fields")[0]
    named = {
        (method, path.replace("{id}", next((name for part, name in ids.items() if part in path), "")))
        for row in table.splitlines()
        if row.startswith("| `")
        for method, path in re.findall(r"`(GET|POST|DELETE) (\S+)`", row.split("|")[1])
    }
    routes = paths()
    assert all(method in routes[path] for method, path in named)
    unnamed = {path for path in routes if not path.startswith("/lamina/")} - {path for _, path in named}
    assert unnamed == set()


def test_the_tables_of_ignored_and_refused_fields_are_those_of_the_schemas() -> None:
    ignored, refused = SERVE.partition("accepted and change nothing")[2].partition("These are refused")[::2]
    tables = {"Ignored": ignored, "Refused": refused.partition("A chat's `max_tokens`")[0]}
    fields = ChatRequest.model_fields | CompletionRequest.model_fields
    for word, table in tables.items():
        named = {
            name
            for row in table.splitlines()
            if row.startswith("| `")
            for name in re.findall(r"`([\w.]+)`", row.split("|")[1])
        }
        known = {name for name, field in fields.items() if (field.description or "").startswith(word)}
        assert {name for name in named if "." not in name} == known


def test_every_status_is_in_the_table_of_errors() -> None:
    table = SERVE.partition("## Errors and limits")[2].partition("The `openai` package")[0]
    statuses = {int(status) for status in re.findall(r"^\| (\d{3}) \|", table, re.MULTILINE)}
    document = create_app(Frontend(Unobserved()), ServerSettings(model="m"), NoMetrics()).openapi()
    told = {
        int(status)
        for path in document["paths"].values()
        for operation in path.values()
        for status in operation["responses"]
    }
    assert told - {200} <= statuses


def test_bodies_in_the_examples_are_valid() -> None:
    models = {
        "chat/completions": ChatRequest,
        "completions": CompletionRequest,
        "tokenize": TokenizeRequest,
        "embeddings": EmbeddingRequest,
        "rerank": RerankRequest,
    }
    examples = re.findall(r"curl (?:-N )?http://127\.0\.0\.1:8000/(?:v1/)?(\S+) .*?-d '(.*?)'", SERVE, re.DOTALL)
    assert len(examples) >= 4
    for path, body in examples:
        read(models[path], json.loads(body))  # type: ignore[type-var]
