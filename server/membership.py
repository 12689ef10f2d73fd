"""Who may greet: nodes whose keys the coordinator's roster has, each in its own hospital's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from flwr.serverapp import Grid
from oncofed.common import wire
from oncofed.common.consortium import SignedRoster
from oncofed.common.errors import Refusal


@dataclass(frozen=True)
class Membership:
    """The roster in a coordinator's folder; it is read at every greeting, so who was revoked since comes in no more."""

    file: Path

    @classmethod
    def of(cls, file: str) -> Membership:
        """Raises `ValueError` at once where the roster cannot be used."""
        membership = cls(Path(file))
        membership.read()
        return membership

    def check(self, grid: Grid, node: int, greeting: wire.Config) -> None:
        """Refuse a greeting from a node whose key is not the one of the hospital that it names."""
        roster, site = self.read(), str(greeting["site"])
        key = _node_key(grid, node)
        owner = next((name for name, m in roster.members.items() if m.node_key == key), None)
        where = f"roster {roster.serial} of '{roster.consortium}'"
        if owner is None:
            raise Refusal(
                f"the node that calls itself {site} has a key that {where} does not know; admit its enrolment"
            )
        if owner != site:
            raise Refusal(
                f'the node of {owner}, by {where}, calls itself {site}; its site.toml should say name = "{owner}"'
            )
        member = roster.members[owner]
        if member.status != "active":
            raise Refusal(f"{site} is {member.status} by {where}, since {member.since}")
        identity = str(greeting.get("identity", ""))
        if identity and identity != member.identity:
            raise Refusal(
                f"{site} has the identity {identity[:16]}, {where} says {member.identity[:16]}; has it a new work folder? Its node wants the "
                "work folder that it enrolled with, or a new enrolment"
            )

    def read(self) -> SignedRoster:
        """Raises `ValueError` where the roster, or the coordinator.pub beside it, does not hold."""
        beside = self.file.parent / "coordinator.pub"
        if not beside.exists():
            raise ValueError(
                f"{self.file} cannot be verified: there is no coordinator.pub beside it; name the one in the coordinator's folder"
            )
        return SignedRoster.read(self.file, beside.read_text().strip())


def _node_key(grid: Grid, node: int) -> str:
    """A node's key, as rosters write it."""
    told = next((n.public_key for n in grid.get_nodes() if n.node_id == node), b"")
    try:
        key = load_pem_public_key(bytes(told))
    except (ValueError, UnsupportedAlgorithm):
        raise Refusal(
            f"node {node} comes without a key that can be held against the roster: the SuperLink must authenticate nodes "
            "(--enable-supernode-auth), or the study name no roster"
        ) from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise Refusal(f"node {node} has no key of ECDSA, as Flower wants it")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
