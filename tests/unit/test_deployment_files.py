"""Compose files, charts and units against the schemas of those who read them. An image is built nowhere here: there is no engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from oncofed.common.consortium import ConsortiumFile
from oncofed.deploy.cli import cli
from oncofed.deploy.consortium.kits import kit_files
from toy_consortium import Toy
from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
NEWEST, OLDEST = "1.33", "1.27"
SITES: dict[str, dict[str, Any]] = {
    "host path": {"data": {"hostPath": "/srv/oncofed/site"}},
    "claim and GPU": {
        "data": {"existingClaim": "site"},
        "gpu": {"enabled": True, "count": 2, "runtimeClassName": "nvidia"},
        "work": {"existingClaim": "work"},
        "pullSecrets": ["registry"],
    },
}
SERVERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "inside": {
        "service": {"type": "ClusterIP", "allowFrom": ["192.0.2.0/24"]},
        "storage": {"className": "fast"},
        "tolerations": [{"operator": "Exists"}],
    },
}


def kit(name: str) -> str:
    settings = ConsortiumFile(name="Toy", address="fl.example.org", members=("Aachen",))
    files = kit_files(settings, "Aachen", token="0" * 64, authority=b"", private=bytes(32), new_keys=False)
    return files[name].decode()


def compose_files() -> dict[str, dict[str, Any]]:
    return {
        "server": yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text()),
        "site": yaml.safe_load(kit("compose.yaml")),
        "site with a GPU": yaml.safe_load(kit("compose.gpu.yaml")),
    }


@pytest.mark.parametrize("name", ["server", "site", "site with a GPU"])
def test_compose_files_follow_the_specification(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed (extra: charts)")
    where = resources.files(schemas).joinpath("builtin_schemas", "vendor", "compose-spec.json")
    jsonschema.validate(compose_files()[name], json.loads(where.read_text()))


def test_containers_have_no_rights_and_only_the_edge_is_reached() -> None:
    files = compose_files()
    services = files["server"]["services"] | files["site"]["services"]
    assert services.keys() == {"superlink", "superexec", "edge", "node"}
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"] == ["/tmp"]
        assert service["restart"] == "unless-stopped"
        assert "privileged" not in service
        assert ("ports" in service) == (name == "edge"), "only the edge is published"
    assert files["server"]["networks"]["inside"] == {"internal": True}
    assert services["superlink"]["networks"] == ["inside"]
    assert services["superexec"]["network_mode"] == "service:superlink"
    assert services["node"]["volumes"] == ["..:/data:ro", "../.oncofed:/work"]


def commands() -> dict[str, list[str]]:
    """What containers are started with, by where it stands."""
    found = {
        f"compose {n}": s["command"]
        for f in compose_files().values()
        for n, s in f["services"].items()
        if "command" in s
    }
    for chart, values in (("oncofed-server", {}), ("oncofed-site", SITES["host path"])):
        for manifest in rendered(chart, values):
            for container in manifest["spec"].get("template", {}).get("spec", {}).get("containers", []):
                found[f"{chart} {container['name']}"] = container["args"]
    return found


def test_what_containers_are_started_with_is_a_command() -> None:
    """Every word is one that `oncofed` takes: parsed by its own parser, not run."""
    for where, words in commands().items():
        told = parsed(list(map(str, words)))
        assert told["log_to_stdout"], where
        assert told["health"].rpartition(":")[2].isdigit(), where
        assert told.get("only", "link") in ("link", "exec", "edge")


def parsed(words: list[str]) -> dict[str, Any]:
    """What the parser of `oncofed` makes of words; raises on one that it does not know."""
    command: Any = get_command(cli)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return dict(command.make_context("oncofed", words).params)


def test_commands_of_the_guide_are_commands() -> None:
    guide = (ROOT / "docs" / "deployment.md").read_text()
    lines = re.findall(r"^ {4}oncofed ([^─\n]+)$", guide, re.M)
    assert len(lines) >= 8
    for line in lines:
        parsed(shlex.split(re.sub(r"[\[\]]", "", line.partition("  #")[0].partition(" > ")[0])))
    options = set(re.findall(r"`(--[a-z-]+)", guide.split("| option | for |")[1].split("As a service")[0]))
    start: Any = get_command(cli).commands["server"].commands["start"]  # type: ignore[attr-defined]
    assert options <= {o for p in start.params for o in p.opts}


def rendered(chart: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (extra: charts)")
    texts = helm.Chart.load(str(DEPLOY / "helm" / chart)).render(values, name="ours", namespace="research")
    return [m for text in texts.values() for m in yaml.safe_load_all(text) if m]


CASES = [("oncofed-server", v) for v in SERVERS.values()] + [("oncofed-site", v) for v in SITES.values()]
NAMES = [f"server: {n}" for n in SERVERS] + [f"site: {n}" for n in SITES]


@pytest.mark.parametrize(("chart", "values"), CASES, ids=NAMES)
def test_charts_pass_helms_lint_and_kubernetes_schemas(chart: str, values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (extra: charts)")
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (extra: charts)"
    )
    report = helm.lint(str(DEPLOY / "helm" / chart), values, strict=True)
    assert not report["errors"]
    assert [m["error"] for m in report["messages"] if m["severity"] > 1] == []
    for manifest in rendered(chart, values):
        for version in (OLDEST, NEWEST):
            kubernetes.validate(manifest, version, strict=True)


@pytest.mark.parametrize(("chart", "values"), CASES, ids=NAMES)
def test_pods_have_no_rights_and_open_nothing(chart: str, values: dict[str, Any]) -> None:
    by_kind = {m["kind"]: m["spec"] for m in rendered(chart, values)}
    pod = (by_kind.get("Deployment") or by_kind["StatefulSet"])["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod
    for container in pod["containers"] + pod.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for container in pod["containers"]:
        port = int(container["args"][-1].rpartition(":")[2])
        assert container["livenessProbe"]["grpc"] == {"port": port}
        assert container["readinessProbe"]["grpc"] == {"port": port, "service": "ready"}
    policy = by_kind["NetworkPolicy"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    if chart == "oncofed-site":
        assert "Service" not in by_kind
        assert policy["ingress"] == []
        assert policy["egress"][0]["ports"] == [{"protocol": "TCP", "port": 9443}]
        mounts = {m["name"]: m.get("readOnly", False) for m in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"data": True, "work": False, "temporary": False}
        gpu = pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        assert gpu == (2 if "gpu" in values else None)
    else:
        assert policy["egress"] == []
        assert [p["port"] for p in policy["ingress"][0]["ports"]] == ["fleet"]
        assert [p["targetPort"] for p in by_kind["Service"]["ports"]] == ["fleet"]
        assert len({c["args"][-1] for c in pod["containers"]}) == 3, "containers of a pod share its ports"


@pytest.mark.parametrize(
    ("chart", "values"),
    [
        ("oncofed-site", {}),
        ("oncofed-site", {"data": {"hostPath": "/a", "existingClaim": "b"}}),
        ("oncofed-site", {"data": {"hostPath": "relative"}}),
        ("oncofed-site", {"data": {"hostPath": "/a"}, "gpuu": True}),
        ("oncofed-server", {"port": 443}),
        ("oncofed-server", {"service": {"allowFrom": ["everybody"]}}),
    ],
)
def test_values_that_cannot_be_meant_are_refused(chart: str, values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (extra: charts)")
    with pytest.raises(helm.HelmValuesError):
        helm.Chart.load(str(DEPLOY / "helm" / chart)).validate_schema(values)


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for chart in ("oncofed-server", "oncofed-site"):
        assert yaml.safe_load((DEPLOY / "helm" / chart / "Chart.yaml").read_text())["appVersion"] == version
    assert f"ONCOFED_VERSION:-{version}" in (DEPLOY / "docker" / "compose.yaml").read_text()


def test_the_image_is_built_from_what_there_is() -> None:
    """Its build was never run here; this holds its words against the tree."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    sources = [w for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for w in line.split()[:-1]]
    allowed = {
        line[1:].removesuffix("/**") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert set(sources) == allowed
    assert all((ROOT / s).exists() for s in sources)
    assert re.search(r"^USER 10001:10001$", text, re.M)
    assert "HEALTHCHECK" in text
    assert '"oncofed", "health", "127.0.0.1:8081"' in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("port", [9443, 443])
def test_units_can_be_read_by_systemd(tmp_path: Path, port: int) -> None:
    toy = Toy.make(tmp_path / "toy")
    settings = toy.folder.path / "consortium.toml"
    settings.write_text(settings.read_text() + f"port = {port}\n")
    unit = CliRunner().invoke(cli, ["server", "unit", str(toy.folder.path)])
    assert unit.exit_code == 0
    assert ("CAP_NET_BIND_SERVICE" in unit.output) == (port < 1024)
    program = tmp_path / "oncofed"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    server = re.sub(r'^ExecStart="[^"]+"', f'ExecStart="{program}"', unit.output, flags=re.M)
    site = kit("oncofed-site.service").replace("/srv/oncofed/site/consortium/run.sh", str(program))
    for name, text in (("oncofed-server.service", server), ("oncofed-site.service", site)):
        assert "NoNewPrivileges=yes" in text
        assert "ProtectSystem=strict" in text
        (tmp_path / name).write_text(text)
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LANG": "C"})
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
