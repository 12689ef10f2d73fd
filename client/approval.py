"""What a named person at the hospital approved: the installed package, Flower bundles, the text of studies; and what of it runs.

`approvals.jsonl` in the site's folder is append-only and chained: who, when, what, by hashes. A later withdrawal takes an approval
back. Hashes of the package say that this is the code which was looked at; they are no defence against a package that lies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from oncofed.client.bundle_store import Bundle, flower_home, others
from oncofed.client.chain_file import Chain, Words
from oncofed.client.release_log import now
from oncofed.common.errors import Refusal
from oncofed.common.plan import Plan
from oncofed.common.signed_study import possible_texts, signed_text, text_digest
from oncofed.common.study import Study
from oncofed.common.wire import package_version

FILE = "approvals.jsonl"
PARTS = ("common", "client", "server", "deploy")
RUNNING = "ONCOFED_BUNDLE"
"""The environment variable in which the guarded ClientApp process finds the SHA-256 of the bundle that it was started with."""

WORDS = Words(
    "file of approvals",
    "nobody can tell what was approved, so nothing that needs an approval is answered",
    "put it and its .head back from a backup; without one, move both files away and approve anew (oncofed site approve)",
)

Op = Literal["approve", "withdraw"]


@dataclass(frozen=True)
class Package:
    """An installed oncofed: its version, and the hash of its code."""

    version: str
    hash: str

    @classmethod
    def installed(cls) -> Package:
        return cls(package_version(), package_hash())


@dataclass(frozen=True)
class Text:
    """A study or a plan by its name and the digest of its text."""

    kind: Literal["study", "plan"]
    name: str
    digest: str

    @classmethod
    def of(cls, asked: Study | Plan) -> Text:
        return cls("plan" if isinstance(asked, Plan) else "study", asked.name, text_digest(signed_text(asked)))


Thing = Package | Bundle | Text


@dataclass(frozen=True)
class Approvals:
    """The approvals of one site."""

    folder: Path
    site: str

    @property
    def chain(self) -> Chain:
        return Chain(self.folder / FILE, self.site, WORDS)

    def write(self, things: Sequence[Thing], by: str, op: Op = "approve") -> None:
        """Add what a person approves or withdraws; raises `ValueError` without a name."""
        if len(by.split()) < 2 or not by.isprintable():
            raise ValueError(f"--by {by!r}: a person answers for this; write the full name, as --by 'Dr. Ada Lovelace'")
        said = {_word(thing): asdict(thing) for thing in things}
        self.chain.add({"op": op, "time": now(), "by": by.strip(), **said})

    def read(self) -> list[dict[str, Any]]:
        """All entries; raises `Refusal` where the file was changed."""
        return self.chain.read()

    def check_package(self, package: Package) -> None:
        """Refuse an installed package that nobody approved."""
        if package.hash not in self._standing("package", "hash"):
            raise Refusal(
                f"site {self.site}: nobody here approved oncofed {package.version} with the code {package.hash[:16]}, which is installed "
                "(approved_code); its engineer may do so after review: oncofed site approve"
            )

    def check_bundle(self, sha256: str) -> None:
        """Refuse a Flower bundle that nobody approved."""
        if sha256 not in self._standing("bundle", "sha256"):
            raise Refusal(
                f"site {self.site}: nobody here approved the Flower bundle {sha256[:16]} (approved_code); send it to the hospital (oncofed study "
                "bundle), whose engineer may approve it: oncofed site approve --bundle"
            )

    def check_text(self, asked: Study | Plan) -> None:
        """Refuse a study or a plan that nobody approved as it is."""
        approved = self._standing("study", "digest")
        if not any(text_digest(text) in approved for text in possible_texts(asked)):
            what = Text.of(asked)
            raise Refusal(
                f"site {self.site}: nobody here approved the {what.kind} '{what.name}' as it is asked, {what.digest[:16]} (approved_studies); "
                "send its file to the hospital, whose engineer may approve it: oncofed site approve --study"
            )

    def bundles(self) -> list[Bundle]:
        """Those that are approved now."""
        standing = self._standing("bundle", "sha256")
        entries = [e["bundle"] for e in self.read() if "bundle" in e]
        found = {b["sha256"]: b for b in entries if b["sha256"] in standing}
        return [Bundle(**b | {"files": tuple(b["files"])}) for b in found.values()]

    def _standing(self, word: str, key: str) -> set[str]:
        standing: set[str] = set()
        for entry in self.read():
            if word in entry:
                (standing.add if entry["op"] == "approve" else standing.discard)(entry[word][key])
        return standing


def check_running(folder: Path, site: str) -> None:
    """Refuse where the installed package, or the bundle that this process was started with, is not approved."""
    approvals = Approvals(folder, site)
    approvals.check_package(Package.installed())
    bundle = os.environ.get(RUNNING, "")
    if not bundle:
        raise Refusal(
            f"site {site}: its policy wants an approved bundle (approved_code), and the node runs without the guard that holds bundles against "
            "the approvals; its engineer must start it with the guard's folder first in PATH, which oncofed site approve names"
        )
    approvals.check_bundle(bundle)
    odd = others(flower_home(), approvals.bundles())
    if odd:
        raise Refusal(
            f"site {site}: the folder of its node's bundles holds {odd[0][:80]!r}, which nobody here approved (approved_code); its engineer must "
            "find out how it came there, and remove it"
        )


@cache
def package_hash() -> str:
    """The SHA-256 over all Python files of the installed package, whatever machine it lies on."""
    return code_hash((part, _folder_of(f"oncofed.{part}")) for part in PARTS)


def code_hash(parts: Iterable[tuple[str, Path]]) -> str:
    """The SHA-256 over names and contents of the Python files below folders, each under its part's name; ends of lines do not count."""
    files = {
        f"{part}/{file.relative_to(folder).as_posix()}": file for part, folder in parts for file in folder.rglob("*.py")
    }
    out = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes().replace(b"\r\n", b"\n")
        out.update(f"{name}\0{len(content)}\0".encode() + content)
    return out.hexdigest()


def _folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


def _word(thing: Thing) -> str:
    return {Package: "package", Bundle: "bundle", Text: "study"}[type(thing)]
