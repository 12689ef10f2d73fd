"""Secure sums among hospitals that enrolled: whoever is not in the coordinator's roster, with its own key, is in no total."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from oncofed.client.consortium import accept_roster
from oncofed.client.data.site import SiteFolder
from oncofed.client.enrol import enrol
from oncofed.common.study import Study
from oncofed.deploy.consortium.folder import KITS, ROSTER, Folder, init
from oncofed.deploy.consortium.members import admit, revoke, rotate_member
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.app import run_study
from oncofed.server.roster import NotEnoughSites
from test_private_study import PRIVATE, Hospitals
from toy_consortium import write_settings

Make = Callable[..., Study]
SHARED: dict[str, Any] = PRIVATE | {
    "training__local_steps": 1,
    "privacy__secure_sum": True,
    "privacy__noise": "shared",
    "privacy__sharing_sites": 4,
}


class Members(Hospitals):
    """Hospitals whose coordinator has provisioned them; their nodes show their keys, as Flower's authenticated ones do."""

    def __init__(self, consortium: Path, root: Path) -> None:
        super().__init__(consortium, root, "min_cell = 1\n")
        self.names = [SiteFolder.open(f).name for f in self.folders]
        init(write_settings(root / "consortium.toml", members=tuple(self.names)), root / "coordinator")
        self.folder = Folder.open(root / "coordinator")
        for name in self.names:
            self.join(name)
        self.hand_out()

    @property
    def roster(self) -> Path:
        return self.folder.path / ROSTER

    def join(self, name: str) -> None:
        i = self.names.index(name)
        done = enrol(self.folder.path / KITS / f"{name}.zip", self.folders[i], self.works[i])
        admit(self.folder, done.file)

    def hand_out(self) -> None:
        for folder in self.folders:
            accept_roster(folder, self.roster)

    def grid(self, fault: Any = None) -> InProcessGrid:
        grid = super().grid(fault)

        def nodes() -> Iterator[Any]:
            for i, work in enumerate(self.works):
                key = load_ssh_public_key((work / "node.pub").read_bytes())
                pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
                yield SimpleNamespace(node_id=1000 + i, public_key=pem)

        grid.get_nodes = nodes  # type: ignore[method-assign]
        return grid


@pytest.fixture
def members(consortium: Path, tmp_path: Path) -> Members:
    return Members(consortium, tmp_path / "hospitals")


@pytest.fixture
def secure(small_study: Make) -> Study:
    return small_study(privacy__secure_sum=True, training__rounds=1, evaluation__tables=False, aggregation__min_sites=3)


def reasons(results: dict[str, Any]) -> dict[str, str]:
    return {x["site"]: x["reason"] for x in results["left_out"]}


def test_members_of_the_roster_make_a_total(members: Members, secure: Study) -> None:
    results = members.run(secure.changed(runtime__roster=str(members.roster)))
    assert results["left_out"] == []
    assert not any((work / "pinned-members.json").exists() for work in members.works)


def test_a_revoked_hospital_is_refused_by_name(members: Members, secure: Study) -> None:
    revoke(members.folder, "Bergen")
    members.hand_out()
    with pytest.raises(NotEnoughSites, match="'Bergen' is revoked by roster"):
        members.run(secure)
    results = members.run(secure.changed(runtime__roster=str(members.roster), name="anew"))
    assert reasons(results).keys() == {"Bergen"}
    assert "Bergen is revoked by roster" in reasons(results)["Bergen"]
    assert results["folds"][0]["curve"][-1]["took_part"] == [n for n in members.names if n != "Bergen"]


def test_another_identity_is_refused(members: Members, secure: Study) -> None:
    """Of somebody who runs a node in a hospital's name, and of one whose new keys nobody admitted."""
    (members.works[1] / "identity.key").unlink()
    with pytest.raises(NotEnoughSites, match=r"'Bergen' has the identity .*, roster \d+ of 'Rare Sarcoma' says"):
        members.run(secure)
    results = members.run(secure.changed(runtime__roster=str(members.roster), name="anew"))
    assert "Bergen has the identity" in reasons(results)["Bergen"]


def test_new_keys_count_once_they_are_admitted_and_handed_out(members: Members, secure: Study) -> None:
    rotate_member(members.folder, "Bergen")
    members.join("Bergen")
    with pytest.raises(NotEnoughSites, match="if the coordinator has admitted those, take the newest roster in"):
        members.run(secure)
    members.hand_out()
    assert members.run(secure.changed(name="anew", runtime__roster=str(members.roster)))["left_out"] == []


def test_a_stranger_is_in_no_total(members: Members, secure: Study) -> None:
    """A site that the roster does not name, however its node got there."""
    (members.folders[1] / "site.toml").write_text(
        (members.folders[1] / "site.toml").read_text().replace("Bergen", "Bergen North")
    )
    with pytest.raises(NotEnoughSites, match=r"'Bergen North' is no member by roster \d+ of 'Rare Sarcoma'"):
        members.run(secure)
    results = members.run(secure.changed(runtime__roster=str(members.roster), name="anew"))
    assert "the node of Bergen, by roster" in str(results["left_out"])


def test_a_pinned_coordinator_without_a_roster_is_said(members: Members, secure: Study) -> None:
    (members.folders[0] / "roster.json").unlink()
    results = members.run(secure)
    (reason,) = set(reasons(results).values())
    assert "has pinned a coordinator (coordinator.pub) but has no roster.json" in reason


def test_an_altered_roster_lets_nobody_in(members: Members, secure: Study) -> None:
    for folder in members.folders:
        file = folder / "roster.json"
        file.write_text(file.read_text().replace('"active"', '"invited"', 1))
    with pytest.raises(
        NotEnoughSites, match=r"its roster.json: the signature of the roster of 'Rare Sarcoma' does not"
    ):
        members.run(secure)
    for folder in members.folders:
        (folder / "coordinator.pub").unlink()
    with pytest.raises(NotEnoughSites, match=r"has a roster.json but no coordinator.pub to hold it against"):
        members.run(secure.changed(name="anew"))


def test_the_hospitals_own_roster_is_a_fall_back(members: Members, secure: Study) -> None:
    lines = "".join(
        f'"{n}" = "{(w / "identity.pub").read_text().strip()}"\n'
        for n, w in zip(members.names, members.works, strict=True)
    )
    for folder in members.folders:
        (folder / "roster.json").unlink()
        (folder / "members.toml").write_text(lines)
    assert members.run(secure)["left_out"] == []


def test_shared_noise_wants_the_hospitals_own_word_beside_the_coordinators(members: Members, small_study: Make) -> None:
    """A coordinator signs the roster and may run the server: what hospitals know of each other holds as well."""
    study = small_study(**SHARED, training__rounds=1)
    lines = {n: (w / "identity.pub").read_text().strip() for n, w in zip(members.names, members.works, strict=True)}

    def write(known: dict[str, str]) -> None:
        for folder in members.folders:
            (folder / "policy.toml").write_text("shared_noise = true\nepsilon_budget = 100.0\n")
            (folder / "members.toml").write_text("".join(f'"{n}" = "{key}"\n' for n, key in known.items()))

    write(lines)
    for folder in members.folders:
        (folder / "members.toml").unlink()
    with pytest.raises(NotEnoughSites, match=r"it has no members\.toml"):
        members.run(study)
    write(lines | {"Dublin": lines["Aachen"]})
    with pytest.raises(NotEnoughSites, match=r"'Dublin' has the identity .*, members\.toml says"):
        members.run(study.changed(name="invented"))
    write(lines)
    assert members.run(study.changed(name="known"))["left_out"] == []
    revoke(members.folder, "Bergen")
    members.hand_out()
    with pytest.raises(NotEnoughSites, match="'Bergen' is revoked by roster"):
        members.run(study.changed(name="revoked"))


def test_a_server_that_asks_for_members_wants_nodes_with_keys(
    members: Members, small_study: Make, tmp_path: Path
) -> None:
    study = small_study(runtime__roster=str(members.roster), training__rounds=1, runtime__wait_sites_s=0.2)
    with pytest.raises(NotEnoughSites, match="the SuperLink must authenticate nodes"):
        run_study(study, Hospitals.grid(members))
    shutil.copy(members.roster, tmp_path / "roster.json")
    with pytest.raises(ValueError, match=r"there is no coordinator.pub beside it"):
        members.run(study.changed(runtime__roster=str(tmp_path / "roster.json")))
