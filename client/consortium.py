"""What a hospital knows of its consortium: the coordinator's key that it pinned, and the newest roster under it."""

from __future__ import annotations

import shutil
from pathlib import Path

from oncofed.common import signing
from oncofed.common.consortium import SignedRoster
from oncofed.common.errors import Refusal
from oncofed.common.files import replacing, write_text

COORDINATOR, ROSTER = "coordinator.pub", "roster.json"
"""In the site's folder: the coordinator's public key in hex, and the roster that it signed."""

FOLDER = "consortium"
"""In the site's folder: the files of the start-up kit."""


def pinned_coordinator(folder: Path) -> str:
    """The coordinator's public key (hex), empty where the site has none; raises `ValueError` where the file is no key."""
    file = folder / COORDINATOR
    if not file.exists():
        return ""
    key = file.read_text().strip().lower()
    if not signing.is_public(key):
        raise ValueError(f"{file} is no public key of 64 hex digits; enrol again with the coordinator's start-up kit")
    return key


def pinned_roster(folder: Path, site: str) -> SignedRoster | None:
    """The roster, None where the site has neither pin nor roster; raises `Refusal` where one is there and does not hold."""
    try:
        coordinator = pinned_coordinator(folder)
        if coordinator and (folder / ROSTER).exists():
            return SignedRoster.read(folder / ROSTER, coordinator)
    except (ValueError, OSError) as error:
        raise Refusal(f"site {site}: {str(error).replace(f'{folder}/', 'its ')}") from None
    if (folder / ROSTER).exists():
        raise Refusal(
            f"site {site}: it has a {ROSTER} but no {COORDINATOR} to hold it against; enrol with the coordinator's start-up kit "
            "(oncofed site enrol)"
        )
    return None


def accept_roster(folder: Path, file: Path) -> tuple[SignedRoster, SignedRoster | None]:
    """Take a newer roster in, and follow the coordinator to a new key; the new one and the one before.

    Raises `ValueError`, and leaves all as it was, where it is older, of another coordinator or not signed.
    """
    coordinator = pinned_coordinator(folder)
    if not coordinator:
        raise ValueError(
            f"{folder} pins no coordinator; enrol with its start-up kit first: oncofed site enrol KIT --site {folder}"
        )
    roster = SignedRoster.read(file, coordinator)
    target = folder / ROSTER
    before = SignedRoster.read(target, coordinator) if target.exists() else None
    if before:
        check_newer(roster, before, file)
    if before != roster:
        with replacing(target, durable=True) as temporary:
            shutil.copyfile(file, temporary)
    if (
        roster.coordinator != coordinator
    ):  # after the roster, which names the old key: killed between the two, both still fit
        write_text(folder / COORDINATOR, roster.coordinator + "\n", durable=True)
    return roster, before


def check_newer(roster: SignedRoster, before: SignedRoster, file: Path) -> None:
    """Refuse a roster that would take back what a later one said, or that says otherwise under one number."""
    if roster.consortium != before.consortium:
        raise ValueError(
            f"{file} is the roster of '{roster.consortium}', this site's consortium is '{before.consortium}'"
        )
    if roster.serial < before.serial:
        raise ValueError(
            f"{file} has the serial {roster.serial}, the roster here {before.serial}: an old roster could bring back who was revoked; ask the "
            "coordinator for the newest"
        )
    if roster.serial == before.serial and roster != before:
        raise ValueError(
            f"{file} differs from the roster here, and both have the serial {roster.serial}: a coordinator signs one of a number; ask by "
            "telephone which one is true"
        )
