"""Health by the standard gRPC protocol (grpc.health.v1), for probes of Kubernetes and for `oncofed health`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

READY = "ready"
LOOK_S = 1.0
PORT = 8081

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthServer:
    """Tells what `read` says: by name of a service whether it serves; `""` is the whole, `ready` whether all are at work.

    Without TLS, as probes want it: nothing but names and yes or no can be asked for.
    """

    def __init__(self, address: str, read: Callable[[], Mapping[str, bool]]) -> None:
        self.read, self._servicer, self._stop = read, HealthServicer(), threading.Event()
        # grpc would share the port with another process instead of refusing
        self._server = grpc.server(ThreadPoolExecutor(8, "health"), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise ValueError(
                f"--health {address}: nothing can listen there; write an address of this machine and a free port"
            )

    def __enter__(self) -> HealthServer:
        self._look()
        self._server.start()
        threading.Thread(target=self._follow, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._servicer.enter_graceful_shutdown()
        self._server.stop(1.0).wait()

    def _follow(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        for name, good in self.read().items():
            self._servicer.set(name, _SERVING if good else _NOT_SERVING)


def check(address: str, service: str = "", patience_s: float = 3.0) -> str:
    """What a health server says of a service: SERVING, NOT_SERVING, or why it cannot be asked."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = ask(health_pb2.HealthCheckRequest(service=service), timeout=patience_s)
        except grpc.RpcError as error:
            code = error.code()
            return (
                f"no service '{service}' there"
                if code == grpc.StatusCode.NOT_FOUND
                else f"no answer from {address} ({code.name})"
            )
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
