"""What a coordinator signs, and a hospital approves, of a study or a plan: all that a site acts on, and nothing of how it is run."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

from oncofed.common import signing
from oncofed.common.plan import Plan
from oncofed.common.section import Section
from oncofed.common.sections import EVERY_SITE
from oncofed.common.study import Study

PLAN = "oncofed plan"
"""The purpose of a plan's signature; a study's is `signing.STUDY`."""

OWN: dict[str, Any] = {"runtime": True, "panel": {"file", "names"}, "analysis": {"pathways"}}
"""Of a study, what is the coordinator's own: how it runs, and paths on its machine."""

OWN_OF_PLAN = {"out", "roster", "signature", "wait_sites_s", "timeout_s"}

SUFFIX = ".sig"


def signed_text(asked: Study | Plan) -> dict[str, Any]:
    """The JSON value that a signature covers, defaults filled in; the same at the coordinator and at every site."""
    if isinstance(asked, Plan):
        return asked.model_dump(mode="json", exclude=OWN_OF_PLAN)
    text = asked.model_dump(mode="json", exclude=OWN)
    text["training"]["start"] = Path(asked.training.start).name
    return text


def possible_texts(asked: Study | Plan) -> list[dict[str, Any]]:
    """What may have been signed where this is asked: the server puts the sites' names where a study holds out all of them in turn."""
    text = signed_text(asked)
    if isinstance(asked, Plan) or not asked.splits.held_out_sites:
        return [text]
    return [text, text | {"splits": text["splits"] | {"held_out_sites": [EVERY_SITE]}}]


def identity_text(asked: Study | Plan) -> str:
    """What tells one study or plan from another at a site: all that a signature covers, and nothing that a server may write beside it.

    Which sites are held out in turn may come later, so studies that differ in that alone are one.
    """
    return json.dumps(possible_texts(asked)[-1], sort_keys=True)


def text_digest(text: dict[str, Any]) -> str:
    """The SHA-256 that an approval names a text by."""
    return hashlib.sha256(signing.canonical(text)).hexdigest()


def purpose_of(asked: Study | Plan) -> str:
    return PLAN if isinstance(asked, Plan) else signing.STUDY


def sign(asked: Study | Plan, private: bytes) -> str:
    """The coordinator's signature, 128 hex digits."""
    return signing.sign(private, purpose_of(asked), signed_text(asked))


def is_signed(asked: Study | Plan, public: str, signature: str) -> bool:
    """Whether the owner of `public` signed what is asked."""
    return any(signing.verify(public, purpose_of(asked), text, signature) for text in possible_texts(asked))


def read_file(file: Path) -> Study | Plan:
    """A study, or a plan where the file has a top-level `kind`; raises `ValueError` where it is neither."""
    try:
        data = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as a study or a plan: {error}") from None
    return Plan.from_config(data) if "kind" in data else Study.parse(data, str(file))


def signature_beside(file: Path) -> str:
    """The signature in FILE.sig; empty where there is none."""
    beside = file.with_name(file.name + SUFFIX)
    return beside.read_text().strip() if beside.exists() else ""


def with_signature(asked: Section, signature: str) -> Any:
    """A study or a plan that carries a signature."""
    if isinstance(asked, Study):
        return asked.changed(runtime__signature=signature)
    return asked.model_copy(update={"signature": signature})
