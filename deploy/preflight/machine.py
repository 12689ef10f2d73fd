"""The hospital's own side: enrolment, keys, roster, policy, disk, GPU and data."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from oncofed.client.consortium import pinned_roster
from oncofed.client.data.check import check_site
from oncofed.client.enrol import NODE_KEY
from oncofed.client.members import Identity
from oncofed.client.policy import Policy
from oncofed.common.enrolment import Kit
from oncofed.common.errors import Refusal
from oncofed.common.wire import package_version
from oncofed.deploy.preflight.findings import Check, fail, ok, warn

LEAST_BYTES, ENOUGH_BYTES = 1_000_000_000, 10_000_000_000
"""Free on the work folder's disk: prepared data, checkpoints of a round, logs."""


def version_check(kit: Kit) -> Check:
    here = package_version()
    if kit.version == here:
        return ok("version", f"oncofed {here}, as the coordinator's")
    return warn(
        "version",
        f"oncofed {here} here, {kit.version} at the coordinator when the kit was made",
        "a study wants one version at all hospitals: install the one that the coordinator names",
    )


def key_checks(work: Path, kit: Kit, folder: Path) -> Iterator[Check]:
    """The node's key, who can read it, and whether the roster has it."""
    file = work / NODE_KEY
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__})"
        yield fail(
            "node key",
            f"{file} {why}",
            "enrol first, name the work folder of the enrolment with --work-dir, or start as the user who owns it",
        )
        return
    open_to = [n for n in (NODE_KEY, "identity.key") if _others_read(work / n)]
    if open_to:
        yield fail(
            "node key",
            f"others on this machine can read {', '.join(open_to)}",
            f"chmod 600 {' '.join(str(work / n) for n in open_to)}",
        )
    else:
        yield ok("node key", "its owner alone can read it")
    yield _roster_check(folder, work, kit.member, public)


def _roster_check(folder: Path, work: Path, site: str, node_key: str) -> Check:
    remedy = f"ask the coordinator for it, then oncofed site roster roster.json --site {folder}"
    try:
        roster = pinned_roster(folder, site)
    except Refusal as error:
        return fail("roster", str(error), remedy)
    if roster is None:
        return warn("roster", "the site has no roster.json yet", remedy)
    where, member = f"roster {roster.serial} of {roster.issued[:10]}", roster.members.get(site)
    if member is None:
        return fail(
            "roster",
            f"{where} does not name {site}",
            "the name in site.toml must be the one that the coordinator admitted",
        )
    if member.status != "active":
        return fail(
            "roster",
            f"{site} is {member.status} by {where}",
            "send the enrolment file to the coordinator, and take the new roster in",
        )
    if member.node_key != node_key:
        return fail(
            "roster",
            f"{where} has another node key for {site}",
            "name the work folder of the enrolment with --work-dir, or enrol again with a new kit",
        )
    if (work / "identity.key").exists() and Identity.of(work, site).public.hex() != member.identity:
        return fail(
            "roster",
            f"{where} has another identity for {site}",
            "name the work folder of the enrolment with --work-dir, or enrol again with a new kit",
        )
    return ok("roster", f"{site} is an active member by {where}")


def policy_check(folder: Path) -> Check:
    try:
        Policy.read(folder)
    except Refusal as error:
        return fail("policy", str(error), "docs/site.md lists its keys; a policy that cannot be read lets nothing out")
    if not (folder / "policy.toml").exists():
        return warn(
            "policy",
            "there is no policy.toml: the defaults hold",
            "docs/site.md lists them; write the file where the hospital wants others",
        )
    return ok("policy", "policy.toml can be read")


def disk_check(work: Path) -> Check:
    """Room in the work folder, and whether it can be written to."""
    at = next((p for p in (work, *work.parents) if p.exists()), Path("/"))
    if not os.access(at, os.W_OK):
        return fail(
            "disk", f"{at} cannot be written to", "start as the user who owns it, or choose another with --work-dir"
        )
    free = shutil.disk_usage(at).free
    told = f"{free / 1e9:.0f} GB free for {work}" if free > 1e9 else f"{free / 1e6:.0f} MB free for {work}"
    if free < LEAST_BYTES:
        return fail("disk", told, f"make room: {LEAST_BYTES / 1e9:.0f} GB at least")
    if free < ENOUGH_BYTES:
        return warn("disk", told, f"{ENOUGH_BYTES / 1e9:.0f} GB leave room for large cohorts")
    return ok("disk", told)


def gpu_check() -> Check:
    import torch

    if not torch.cuda.is_available():
        remedy = "expected on a machine without one; otherwise install its driver and a torch with CUDA, and let the container have it"
        return warn("GPU", "torch finds none: training runs on the CPU", remedy)
    free, total = torch.cuda.mem_get_info()
    return ok("GPU", f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")


def data_check(folder: Path) -> Check:
    """The errors of `oncofed site check`, counted: what they are is for that command to say."""
    report = check_site(folder)
    errors = sum(f.level == "error" for f in report.findings)
    warnings = len(report.findings) - errors
    if errors:
        return fail("data", f"{errors} errors, {warnings} warnings", f"oncofed site check {folder}")
    return warn("data", f"{warnings} warnings", f"oncofed site check {folder}") if warnings else ok("data", "no errors")


def _others_read(file: Path) -> bool:
    try:
        return bool(stat.S_IMODE(file.stat().st_mode) & 0o077)
    except OSError:
        return False
