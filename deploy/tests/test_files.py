"""The files that no test here can run: against schemas and linters, and against each other."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import redis
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from deploy import env_example
from deploy.compose import ComposeError, in_order, read_compose, seconds
from deploy.topology import COMPOSE_FILE, ROOT
from gateway.tests.live import LiveProxy, free_port

KUBERNETES = ROOT / "deploy" / "kubernetes"
MANIFESTS = [
    document
    for path in sorted(KUBERNETES.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in yaml.safe_load_all(path.read_text())
]
BIN = Path(sys.executable).parent


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def settings_in(text: str) -> set[str]:
    return set(re.findall(r"^\| `([A-Z_]+)` \|", text, re.M))


def readme_settings() -> set[str]:
    return settings_in((ROOT / "README.md").read_text())


# Settings


def test_the_example_of_env_is_what_the_readme_says() -> None:
    example = env_example.EXAMPLE.read_text()
    made = env_example.rendered((ROOT / "README.md").read_text())
    assert example == made, "run: python -m deploy.env_example"
    named = set(re.findall(r"^#([A-Z_]+)=", example, re.M))
    assert named == readme_settings() | {"PROXYSITE_IMAGE", "HTTP_PORT", "HTTPS_PORT", "GATEWAYS"}


def test_the_defaults_in_the_example_are_values_that_start() -> None:
    lines = re.findall(r"^#([A-Z_]+)=(.+)$", env_example.EXAMPLE.read_text(), re.M)
    placed = {"HOST", "PORT", "VAR_DIR", "SANDBOX_ENABLED", "PROXYSITE_IMAGE", "HTTP_PORT", "HTTPS_PORT", "GATEWAYS"}
    with LiveProxy(**{name: value for name, value in lines if name not in placed}) as proxy:
        assert proxy.get("/readyz").status_code == 200


# docker-compose.yml


def test_the_compose_file_fits_the_specifications_schema() -> None:
    run(str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE))


def test_docker_compose_itself_reads_the_compose_file(tmp_path: Path) -> None:
    program = shutil.which("docker-compose")
    if not program:
        assert not os.environ.get("CI"), "docker-compose is missing"
        pytest.skip("docker-compose is missing: apt-get install docker-compose")
    shutil.copy(COMPOSE_FILE, tmp_path)
    shutil.copy(env_example.EXAMPLE, tmp_path / ".env")
    services = yaml.safe_load(run(program, "config", cwd=tmp_path))["services"]
    specs = read_compose(COMPOSE_FILE, {})
    assert set(services) == set(specs)
    for name, spec in specs.items():
        assert tuple(services[name]["command"]) == spec.command
        assert services[name].get("environment", {}) == spec.environment


def test_services_start_in_an_order_in_which_each_finds_what_it_needs() -> None:
    groups = [{spec.name for spec in group} for group in in_order(read_compose(COMPOSE_FILE, {}))]
    assert groups == [{"postgres", "redis"}, {"migrate"}, {"gateway", "web", "worker", "beat"}, {"nginx"}]


def test_ours_run_without_root_and_write_nowhere_but_where_they_may() -> None:
    services = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        if name != "postgres":  # whose entry point hands its volume over to its user, and then becomes him
            assert not service["user"].startswith(("0", "root")), name
            assert service["cap_drop"] == ["ALL"], name


def test_what_limits_have_counted_survives_redis(tmp_path: Path) -> None:
    service = yaml.safe_load(COMPOSE_FILE.read_text())["services"]["redis"]
    assert service["volumes"] == ["redis:/data"]
    port = free_port()
    command = [*service["command"], "--port", str(port), "--dir", str(tmp_path)]
    if shutil.which(command[0]) is None:
        pytest.skip("redis-server is not installed")
    with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.05), 600), decode_responses=True) as client:
        with killed_at_end(command):
            client.hset("counts", "s", 7)
            client.expire("counts", 3_000_000)
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        with killed_at_end(command):
            assert client.hget("counts", "s") == "7"


@contextlib.contextmanager
def killed_at_end(command: list[str]) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.kill()


def test_containers_are_given_longer_than_the_processes_take_to_stop() -> None:
    for spec in read_compose(COMPOSE_FILE, {}).values():
        if limit := spec.environment.get("GRACEFUL_TIMEOUT_SECONDS") if "serve" in spec.command else None:
            assert spec.stop_grace_s >= int(limit) + 15, spec.name


def test_no_secret_stands_in_the_compose_file() -> None:
    for spec in read_compose(COMPOSE_FILE, {}).values():
        for name, value in spec.environment.items():
            if re.search(r"PASSWORD|SECRET|PEPPER|SESSION_KEYS|DATABASE_URL", name):
                assert name.endswith("_FILE"), name
                assert value.startswith("/run/secrets/")


def test_variables_in_a_compose_file_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "compose.yml"
    path.write_text('services: {a: {restart: "no", command: ["${A:-x}", "${B}", "$$C", "${D:-}"], build: .}}')
    assert read_compose(path, {"B": "y"})["a"].command == ("x", "y", "$C", "")
    path.write_text('services: {a: {restart: "no", command: ["${A:?is needed}"], build: .}}')
    with pytest.raises(ComposeError, match="A: is needed"):
        read_compose(path, {})
    assert (seconds("90s"), seconds("1m30s"), seconds("2m")) == (90, 90, 120)


# Dockerfile


def test_the_dockerfile_passes_hadolint() -> None:
    program = BIN / "hadolint"
    if not program.exists():
        pytest.skip("hadolint's package has no wheel for this machine")
    run(str(program), "Dockerfile")


def test_the_image_gets_all_that_runs_and_nothing_private() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    taken = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    applications = {path.parent.name for path in ROOT.glob("*/apps.py")} | {"proxysite"}
    assert applications | {"manage.py", "requirements.txt", "templates", "static", "deploy/is_alive.py"} <= taken
    assert "requirements-otel.txt" in taken
    assert not taken & {"var", "secrets", ".env", ".git", "deploy", "."}


def test_an_extra_asks_for_the_same_versions_as_everything_else() -> None:
    locked = [
        dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / f"requirements{part}.txt").read_text(), re.M))
        for part in ("", "-otel", "-dev")
    ]
    runtime, extra, dev = locked
    assert {name: runtime.get(name, version) for name, version in extra.items()} == extra
    assert runtime.items() | extra.items() <= dev.items()


# Secrets


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "secrets"
    run("sh", "deploy/make-secrets.sh", str(directory))
    first = {path.name: path.read_text() for path in directory.iterdir()}
    run("sh", "deploy/make-secrets.sh", str(directory))
    assert {path.name: path.read_text() for path in directory.iterdir()} == first
    wanted = yaml.safe_load(COMPOSE_FILE.read_text())["secrets"]
    assert {f"./secrets/{name}" for name in first} == {secret["file"] for secret in wanted.values()}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in directory.iterdir())
    assert all(len(first[name].strip()) >= 48 for name in ("secret_key", "key_pepper", "session_keys"))
    assert len(set(first.values())) == len(first)


# Kubernetes


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: f"{manifest['kind']}-{manifest['metadata']['name']}"
)
def test_a_manifest_fits_kubernetes_schema(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def pods() -> dict[str, dict[str, Any]]:
    kinds = ("StatefulSet", "Deployment", "Job")
    found = [manifest for manifest in MANIFESTS if manifest["kind"] in kinds]
    return {manifest["metadata"]["name"]: manifest["spec"]["template"]["spec"] for manifest in found}


def test_kubernetes_runs_what_compose_runs() -> None:
    specs = {name: spec for name, spec in read_compose(COMPOSE_FILE, {}).items() if spec.is_ours}
    assert set(pods()) == set(specs)
    (settings,) = [manifest["data"] for manifest in MANIFESTS if manifest["kind"] == "ConfigMap"]
    for name, pod in pods().items():
        assert tuple(pod["containers"][0]["command"]) == specs[name].command
        assert set(specs[name].environment) - {"WORKERS"} <= set(settings)


def test_pods_have_no_root_and_what_they_may_write_to() -> None:
    for name, pod in pods().items():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        places = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert places == {"/run/secrets", "/var/lib/proxysite", "/tmp", "/journal"}, name


def test_pods_are_asked_by_a_host_name_that_the_site_knows() -> None:
    for name in ("gateway", "web"):
        (container,) = pods()[name]["containers"]
        probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
        # By /readyz once, at the start: what all pods share, and can do without, must not take all of them out.
        assert [probe["path"] for probe in probes] == ["/readyz", "/healthz", "/healthz"]
        assert all(probe["httpHeaders"] == [{"name": "Host", "value": "localhost"}] for probe in probes)


def test_pods_are_given_longer_than_the_processes_take_to_stop() -> None:
    (settings,) = [manifest["data"] for manifest in MANIFESTS if manifest["kind"] == "ConfigMap"]
    for name in ("gateway", "web"):
        pause_s = int(pods()[name]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        least_s = pause_s + int(settings["GRACEFUL_TIMEOUT_SECONDS"]) + 15
        assert pods()[name]["terminationGracePeriodSeconds"] >= least_s


def test_metrics_are_not_reachable_through_the_ingress() -> None:
    served = {m["metadata"]["name"] for m in MANIFESTS if m["kind"] == "Service" and m["spec"].get("selector")}
    rules = [rule for m in MANIFESTS if m["kind"] == "Ingress" for rule in m["spec"]["rules"]]
    paths = [path for rule in rules for path in rule["http"]["paths"]]
    assert {path["path"] for path in paths} == {"/v1", "/", "/metrics"}
    for host in {rule["host"] for rule in rules}:
        of_host = [path for rule in rules if rule["host"] == host for path in rule["http"]["paths"]]
        (metrics,) = [path for path in of_host if path["path"] == "/metrics"]
        assert metrics["pathType"] == "Exact"
        assert metrics["backend"]["service"]["name"] not in served
        assert all(path["backend"]["service"]["name"] in served for path in of_host if path is not metrics)


def test_kustomize_takes_every_manifest() -> None:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert {f"{KUBERNETES}/{name}" for name in listed} == {
        str(path) for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml"
    }
    if program := shutil.which("kubectl"):
        made = list(yaml.safe_load_all(run(program, "kustomize", str(KUBERNETES))))
        assert len(made) == len(MANIFESTS)
