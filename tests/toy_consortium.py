"""A consortium on paper: a coordinator's folder and hospitals' site folders, without patients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oncofed.client.consortium import accept_roster
from oncofed.client.enrol import Enrolled, enrol
from oncofed.deploy.consortium.folder import KITS, ROSTER, Folder, init
from oncofed.deploy.consortium.members import admit

NAMES = ("Aachen", "St. Bergen", "Cork-2")


def write_settings(file: Path, name: str = "Rare Sarcoma", members: tuple[str, ...] = NAMES, more: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    listed = ", ".join(f'"{m}"' for m in members)
    file.write_text(f'name = "{name}"\naddress = "fl.example.org"\nmembers = [{listed}]\n{more}')
    return file


@dataclass(frozen=True)
class Toy:
    """`coordinator/` and `sites/NAME/` below one root."""

    root: Path

    @classmethod
    def make(cls, root: Path, members: tuple[str, ...] = NAMES, name: str = "Rare Sarcoma") -> Toy:
        init(write_settings(root / "consortium.toml", name, members), root / "coordinator")
        toy = cls(root)
        for member in members:
            toy.site(member)
        return toy

    @property
    def folder(self) -> Folder:
        return Folder.open(self.root / "coordinator")

    @property
    def roster_file(self) -> Path:
        return self.folder.path / ROSTER

    def site(self, name: str) -> Path:
        folder = self.root / "sites" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "site.toml").write_text(f'name = "{name}"\nexpression_unit = "log2"\n')
        return folder

    def kit(self, name: str) -> Path:
        return self.folder.path / KITS / f"{name}.zip"

    def enrol(self, name: str) -> Enrolled:
        return enrol(self.kit(name), self.site(name))

    def admit(self, name: str) -> Enrolled:
        """Enrol a hospital and take it in."""
        done = self.enrol(name)
        admit(self.folder, done.file)
        return done

    def hand_out(self, *names: str) -> None:
        """The roster, to these hospitals."""
        for name in names:
            accept_roster(self.site(name), self.roster_file)
