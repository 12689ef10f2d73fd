"""The edge: an nginx in front of something that would answer anything, and what of it a hospital can reach."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from oncofed.deploy.consortium.certificates import make_authority, make_server
from oncofed.deploy.services import edge
from oncofed.deploy.services.edge import edge_command, find_nginx, write_edge
from oncofed.deploy.services.processes import Child, free_port

try:
    NGINX = find_nginx()
except ValueError:
    NGINX = ""
needs_nginx = pytest.mark.skipif(not NGINX, reason="nginx is not installed")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt, server.crt and server.key in a folder whose name has a blank."""
    folder = tmp_path_factory.mktemp("the edge")
    authority = make_authority("Toy", 30)
    key, certificate = make_server(authority, "Toy", "fl.example.org", 30)
    for name, content in (("ca.crt", authority[1]), ("server.key", key), ("server.crt", certificate)):
        (folder / name).write_bytes(content)
    return folder


def write(folder: Path, run: Path, port: int, superlink: str, bind: str = "127.0.0.1") -> Path:
    files = {"certificate": folder / "server.crt", "key": folder / "server.key", "authority": folder / "ca.crt"}
    return write_edge(run, port=port, superlink=superlink, bind=bind, **files)


class Obliging(http.server.BaseHTTPRequestHandler):
    """Answers everything, with the path that it was asked for."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        told = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def reached(certificates: Path) -> Iterator[int]:
    """Port of an edge in front of an obliging server."""
    behind = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Obliging)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    behind.socket = context.wrap_socket(behind.socket, server_side=True)
    threading.Thread(target=behind.serve_forever, daemon=True).start()
    port = free_port()
    configuration = write(certificates, certificates / "run", port, f"127.0.0.1:{behind.server_address[1]}")
    with (certificates / "edge.log").open("wb") as log:
        nginx = Child(edge_command(NGINX, configuration), folder=certificates, environment=os.environ, output=log)
    try:
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert nginx.alive, (certificates / "edge.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield port
    finally:
        nginx.ask_to_stop()
        nginx.stop()
        behind.shutdown()


def ask(folder: Path, port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    link = http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
    link.request(method, path, body or None)
    answer = link.getresponse()
    return answer.status, answer.read()


@needs_nginx
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/fleet/pull-messages", 200),
        ("POST", "/v1/fleet/send-node-heartbeat?x=1", 200),
        ("GET", "/health", 200),
        ("GET", "/v1/fleet/pull-messages", 403),
        ("PUT", "/v1/fleet/pull-messages", 403),
        ("POST", "/health", 403),
        ("POST", "/v1/control/start-run", 403),
        ("POST", "/v1/control/register-node", 403),
        ("POST", "/v1/runtime/acquire-task", 403),
        ("GET", "/docs", 403),
        ("GET", "/openapi.json", 403),
        ("GET", "/", 403),
        ("POST", "/V1/CONTROL/start-run", 403),
        ("POST", "//v1//control/start-run", 403),
        ("POST", "/v1/fleet/../control/start-run", 403),
        ("POST", "/v1/fleet/%2e%2e/control/start-run", 403),
        ("POST", "/v1/fleet/%252e%252e/control/start-run", 403),
        ("POST", "/v1/fleet/pull-messages/../../control/start-run", 403),
        ("POST", "/v1/fleet/..%2fcontrol%2fstart-run", 403),
        ("POST", "/v1/fleet/x/control", 403),
        ("POST", "/v1/control/../fleet/pull-messages", 200),
    ],
)
def test_only_the_fleet_api_passes(reached: int, certificates: Path, method: str, path: str, status: int) -> None:
    told, body = ask(certificates, reached, method, path)
    assert told == status
    if status != 200:
        assert b"start-run" not in body


@needs_nginx
def test_what_is_handed_on_is_what_was_matched(reached: int, certificates: Path) -> None:
    """Handed on as it came, it would be for the SuperLink to tell where it leads."""
    _, handed_on = ask(certificates, reached, "POST", "/v1/control/../fleet/pull-messages")
    assert handed_on == b"/v1/fleet/pull-messages"


@needs_nginx
def test_pieces_of_messages_pass_and_floods_do_not(reached: int, certificates: Path) -> None:
    assert ask(certificates, reached, "POST", "/v1/fleet/push-object", bytes(6 << 20))[0] == 200
    context = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    link = http.client.HTTPSConnection("localhost", reached, context=context, timeout=10)
    link.putrequest("POST", "/v1/fleet/push-object")
    link.putheader("Content-Length", str(65 << 20))
    link.endheaders()
    assert link.getresponse().status == 413


@needs_nginx
def test_old_tls_is_refused(reached: int, certificates: Path) -> None:
    context = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", reached)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="localhost")


@needs_nginx
def test_what_was_refused_is_in_the_log_and_nothing_else(reached: int, certificates: Path) -> None:
    ask(certificates, reached, "GET", "/seen-and-refused")
    ask(certificates, reached, "GET", "/health?asked-often")
    time.sleep(0.3)
    log = (certificates / "edge.log").read_text()
    assert '"GET /seen-and-refused HTTP/1.1" 403' in log
    assert "asked-often" not in log


@needs_nginx
@pytest.mark.parametrize("bind", ["", "127.0.0.1", "::1"])
def test_nginx_takes_the_configuration(certificates: Path, tmp_path: Path, bind: str) -> None:
    configuration = write(certificates, tmp_path / "run", free_port(), "127.0.0.1:8000", bind)
    if bind == "::1":
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    done = subprocess.run([*edge_command(NGINX, configuration), "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_nginx_would_misread_is_refused(certificates: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nginx cannot be told of this folder"):
        write(certificates, tmp_path / 'a"; include /etc/passwd; #', 9443, "127.0.0.1:8000")


def test_without_nginx_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(edge, "PLACES", ())
    with pytest.raises(ValueError, match=r"nginx is not installed.*nginx-light.*--no-edge"):
        find_nginx()
