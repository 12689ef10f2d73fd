"""Who this hospital is in a secure sum, and whom it takes the others for: identities, pinned by the hospital or at first sight."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from oncofed.client.consortium import COORDINATOR, pinned_coordinator, pinned_roster
from oncofed.client.consortium import ROSTER as SIGNED
from oncofed.common import masks
from oncofed.common.consortium import SignedRoster
from oncofed.common.errors import Refusal
from oncofed.common.files import write_secret, write_text

ROSTER = "members.toml"
"""In the site's folder: `name = "public identity in hex"` for every member, agreed on outside of the federation."""

PINS = "pinned-members.json"
"""In the work folder: the identities that others had at first sight, where there is no roster."""


@dataclass(frozen=True)
class Identity:
    """The site's lasting key: `identity.key` in its work folder, for its owner's eyes; `identity.pub` is for the others."""

    private: bytes

    @classmethod
    def of(cls, work: Path, site: str) -> Identity:
        """Read it, or make it at first use."""
        file = work / "identity.key"
        if not file.exists():
            private = masks.new_identity()
            write_secret(file, private.hex().encode(), lasting=True)
            write_text(work / "identity.pub", masks.identity_of(private).hex() + "\n")
        try:
            private = bytes.fromhex(file.read_text().strip())
            masks.identity_of(private)
        except ValueError:
            raise Refusal(
                f"site {site}: its identity.key cannot be read; restore it, or remove it and send the new identity.pub to all members"
            ) from None
        return cls(private)

    @property
    def public(self) -> bytes:
        return masks.identity_of(self.private)

    def signed(self, question: str, site: str, channel: bytes, mask: bytes) -> masks.Member:
        """The site as a member of the sum of a question."""
        signature = masks.sign(self.private, masks.signed_text(question, site, channel, mask))
        return masks.Member(self.public, channel, mask, signature)


@dataclass(frozen=True)
class Pins:
    """What this site knows of the others: in `folder` the coordinator's signed roster, else the hospital's own; else what it saw
    first, below `work`. `own` has the hospital's own roster hold beside the coordinator's."""

    folder: Path
    work: Path
    site: str
    own: bool = False

    def want_agreement(self) -> None:
        """Refuse to go by first sight, or by the coordinator's word alone: for noise that is shared with the members, whom either could have made up."""
        if not (self.folder / ROSTER).exists():
            raise Refusal(
                f"site {self.site}: noise is shared with members whom the hospital knows, and it has no {ROSTER}; a server could be all the "
                "others, with a coordinator who signs for them. Put names and identities there as the hospitals themselves tell them, or have "
                "the study set privacy.noise = 'own'"
            )

    def check(self, identities: Mapping[str, bytes]) -> None:
        """Refuse a member that is not in the roster or has another identity than before; pin those that are new without a roster."""
        signed = pinned_roster(self.folder, self.site)
        if signed is not None:
            for name, identity in sorted(identities.items()):
                self._active(name, identity, signed)
        roster = self.folder / ROSTER
        if roster.exists() and (signed is None or self.own):
            known = self._read_roster(roster)
            for name, identity in sorted(identities.items()):
                if name not in known:
                    raise Refusal(
                        f"site {self.site}: '{name}' is not in its {ROSTER}; if it is a member, its line must be added there"
                    )
                self._same(name, identity, known[name], ROSTER)
            return
        if signed is not None:
            return
        if pinned_coordinator(self.folder):  # who enrolled expects more than first sight
            raise Refusal(
                f"site {self.site}: it has pinned a coordinator ({COORDINATOR}) but has no {SIGNED} of it, so nobody's identity is known; take "
                "the coordinator's in: oncofed site roster"
            )
        file = self.work / PINS
        seen: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        new = {name: identity.hex() for name, identity in sorted(identities.items()) if name != self.site}
        for name, now in new.items():
            self._same(name, identities[name], seen.get(name, now), PINS)
        if not new.keys() <= seen.keys():
            write_text(file, json.dumps(seen | new, indent=1, sort_keys=True))

    def _active(self, name: str, identity: bytes, roster: SignedRoster) -> None:
        """A member of the coordinator's roster, with the identity that stands there."""
        member, which = roster.members.get(name), f"roster {roster.serial} of '{roster.consortium}'"
        if member is None or member.status == "invited":
            raise Refusal(
                f"site {self.site}: '{name}' is no member by {which}; if it has joined since, take the newest roster in: oncofed site roster"
            )
        if member.status == "revoked":
            raise Refusal(
                f"site {self.site}: '{name}' is revoked by {which}, since {member.since}; the coordinator must leave it out of the study"
            )
        if identity.hex() != member.identity:
            raise Refusal(
                f"site {self.site}: '{name}' has the identity {identity.hex()[:16]}, {which} says {member.identity[:16]}: it is somebody else, "
                "or has new keys; if the coordinator has admitted those, take the newest roster in: oncofed site roster"
            )

    def _same(self, name: str, identity: bytes, pinned: str, where: str) -> None:
        if identity.hex() != pinned:
            raise Refusal(
                f"site {self.site}: '{name}' has the identity {identity.hex()[:16]}, {where} says {pinned[:16]}: it is somebody else, or "
                f"has lost its identity.key; ask the hospital, and if it has, correct {where}"
            )

    def _read_roster(self, file: Path) -> dict[str, str]:
        try:
            known = tomllib.loads(file.read_text())
            if not all(isinstance(v, str) and len(bytes.fromhex(v)) == masks.KEY_BYTES for v in known.values()):
                raise ValueError
        except (ValueError, OSError):
            raise Refusal(
                f'site {self.site}: its {ROSTER} cannot be used; wanted lines of name = "64 hex digits", as identity.pub of each member has'
            ) from None
        return {name: value.lower() for name, value in known.items()}
