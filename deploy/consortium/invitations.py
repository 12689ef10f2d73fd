"""Who may still enrol: a digest of each kit's token, until when it is taken, and which keys took it."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from oncofed.common.consortium import now
from oncofed.common.enrolment import TOKEN_BYTES, Enrolment, token_key
from oncofed.common.files import write_secret


@dataclass(frozen=True)
class Invitations:
    """invitations.json, by member's name: `key`, the token's digest; `until`; `taken`, the fingerprint of the keys that it admitted."""

    file: Path

    def read(self) -> dict[str, dict[str, str]]:
        if not self.file.exists():
            return {}
        try:
            known: dict[str, dict[str, str]] = json.loads(self.file.read_text())
        except ValueError:
            raise ValueError(
                f"{self.file} cannot be read; restore it, or remove it: members stay, and oncofed consortium rotate member makes new kits for those "
                "who have not enrolled"
            ) from None
        return known

    def invite(self, name: str, days: int) -> str:
        """A new token for a member; an older one is void."""
        token = secrets.token_hex(TOKEN_BYTES)
        until = (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._write(self.read() | {name: {"key": token_key(token), "until": until, "taken": ""}})
        return token

    def withdraw(self, name: str) -> None:
        self._write({n: i for n, i in self.read().items() if n != name})

    def check(self, enrolment: Enrolment) -> None:
        """Refuse an enrolment whose maker does not have the member's token, or came too late, or after another one."""
        name, known = enrolment.name, self.read().get(enrolment.name)
        remedy = "oncofed consortium rotate member makes a new kit"
        if known is None:
            raise ValueError(f"nobody is invited as '{name}': the invitation was withdrawn or never made; {remedy}")
        if not enrolment.proves(known["key"]):
            raise ValueError(
                f"the enrolment of '{name}' was not made with the token of its newest kit: the kit was replaced since, is another's, or the "
                f"file was altered; ask the hospital which kit it used, or {remedy}"
            )
        if known["taken"] and known["taken"] != enrolment.fingerprint:
            raise ValueError(
                f"the token of '{name}' has admitted the keys {known['taken']} already, this enrolment has {enrolment.fingerprint}: a kit "
                f"enrols once. Somebody else may have it: ask the hospital by telephone which is its own; {remedy}"
            )
        if not known["taken"] and now() > known["until"]:
            raise ValueError(f"the kit of '{name}' could be used until {known['until']}; {remedy}")

    def take(self, enrolment: Enrolment) -> None:
        """The token is spent on these keys."""
        known = self.read()
        self._write(known | {enrolment.name: known[enrolment.name] | {"taken": enrolment.fingerprint}})

    def open(self) -> dict[str, str]:
        """Until when the tokens hold that nobody took, by name."""
        return {name: i["until"] for name, i in self.read().items() if not i["taken"]}

    def _write(self, known: dict[str, dict[str, str]]) -> None:
        write_secret(self.file, json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False).encode(), lasting=True)
