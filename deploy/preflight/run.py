"""All that is looked at before a node starts, in one report, with a paragraph for the firewall team where the network fails."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from oncofed.client.consortium import FOLDER
from oncofed.client.data.site import SiteFolder
from oncofed.common.certificates import read_certificate
from oncofed.common.enrolment import CA_FILE, Kit
from oncofed.common.errors import Refusal
from oncofed.deploy.preflight.findings import Check, fail, ok
from oncofed.deploy.preflight.machine import (
    data_check,
    disk_check,
    gpu_check,
    key_checks,
    policy_check,
    version_check,
)
from oncofed.deploy.preflight.network import Target, network_checks
from oncofed.deploy.services.node import installed_kit

NETWORK = ("proxy", "name", "port", "TLS", "answer")


@dataclass(frozen=True)
class Preflight:
    """`firewall` is empty where the network lets the node through."""

    title: str
    checks: tuple[Check, ...]
    firewall: str = ""

    @property
    def ok(self) -> bool:
        return not any(c.level == "fail" for c in self.checks)


def preflight(folder: Path, work: Path | None = None, *, data: bool = True) -> Preflight:
    """Look at everything; a mistake that stops one part does not stop the others."""
    work, checks = work or folder / ".oncofed", []
    try:
        site = SiteFolder.open(folder).name
        checks.append(ok("site folder", site))
    except Refusal as error:
        site = folder.name
        checks.append(fail("site folder", str(error), "docs/site.md shows one"))
    firewall = ""
    try:
        kit, authority = installed_kit(folder), (folder / FOLDER / CA_FILE).read_bytes()
        read_certificate(authority, str(folder / FOLDER / CA_FILE))
    except (ValueError, OSError) as error:
        checks.append(fail("enrolment", str(error), "enrol with the coordinator's start-up kit: oncofed site enrol"))
    else:
        checks.append(_member_check(kit, site))
        checks += [version_check(kit), *key_checks(work, kit, folder)]
        found = list(network_checks(Target(kit.address, kit.port, authority.decode())))
        checks += found
        if any(c.name in NETWORK and c.level == "fail" for c in found):
            firewall = firewall_text(kit)
    checks += [policy_check(folder), disk_check(work), gpu_check()]
    if data:
        checks.append(data_check(folder))
    return Preflight(f"Preflight of {site}", tuple(checks), firewall)


def firewall_text(kit: Kit) -> str:
    """What a firewall team must know to let the node out, and no more."""
    return (
        f"Please allow one outbound connection from {platform.node() or 'this machine'} to {kit.address}, TCP port {kit.port}. The protocol is HTTPS "
        "(TLS 1.2 or 1.3, HTTP/1.1, requests that last up to two minutes). Only this machine opens connections; no inbound port, no NAT rule and no "
        "DMZ is needed. TLS must not be intercepted: the server's certificate comes from an authority of the research consortium's own "
        f"('{kit.consortium}'), and the program accepts no other; please exempt {kit.address} from inspection. "
        "What travels are parameters of statistical models and sums over patients, no records of patients."
    )


def _member_check(kit: Kit, site: str) -> Check:
    if kit.member == site:
        return ok("enrolment", f"{site} in {kit.consortium}")
    return fail(
        "enrolment",
        f'the start-up kit is for "{kit.member}", site.toml says "{site}"',
        "correct the name in site.toml, or ask the coordinator for a kit of this name",
    )
