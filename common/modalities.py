"""The kinds of data that a patient may have or lack, and what sites must agree on about images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

RNA, PATHOLOGY, ALTERATIONS = "rna", "pathology", "alterations"
MODALITIES = (RNA, PATHOLOGY, ALTERATIONS)
"""In the order of a model's branches."""


@dataclass(frozen=True)
class Images:
    """What stands for a patient's slides: one vector, or a bag of tiles, of `width` numbers from one `encoder`.

    `features` is a digest of the names of a vector's numbers, empty where they have none.
    """

    kind: Literal["vector", "bag"]
    encoder: str
    width: int
    features: str = ""

    @property
    def text(self) -> str:
        """For messages and errors: `bag of uni2-h, width 1536`."""
        named = f", features {self.features}" if self.features else ""
        return f"{self.kind} of {self.encoder or 'named features'}, width {self.width}{named}"


IMAGE_TROUBLE = (
    "sites hold images that one model cannot read ({}); encode the slides with one encoder, or leave pathology out with "
    "fusion.modalities"
)
EMBEDDING_TROUBLE = "sites embed expression by different models ({}); give all of them the same checkpoint folder"


def agree_text(by_site: Mapping[str, str], trouble: str) -> str:
    """What all sites say that say something, empty where none does; raises `trouble` naming who says what."""
    sites: dict[str, list[str]] = {}
    for site, text in by_site.items():
        if text:
            sites.setdefault(text, []).append(site)
    if len(sites) > 1:
        raise ValueError(
            trouble.format("; ".join(f"{text}: {', '.join(sorted(s))}" for text, s in sorted(sites.items())))
        )
    return next(iter(sites), "")


def parse_images(text: str) -> tuple[str, int]:
    """Kind and width of `Images.text`; raises on another text."""
    match = re.fullmatch(r"(vector|bag) of .{1,80}, width ([1-9][0-9]{0,5})(, features [0-9a-f]{8})?", text)
    if match is None:
        raise ValueError(f"{text[:60]!r} describes no images; wanted such as 'bag of uni2-h, width 1536'")
    return match[1], int(match[2])


@dataclass(frozen=True)
class Beside:
    """What a federation agreed on beside genes: its images, its alterations by name, and the frozen model that embeds RNA.

    `embedding` identifies that model, `embedding_width` is the length of its vectors; both empty where genes enter as they are.
    """

    image_kind: str = ""
    image_width: int = 0
    images: str = ""
    alterations: tuple[str, ...] = ()
    embedding: str = ""
    embedding_width: int = 0

    def config(self) -> dict[str, str | int]:
        """For messages and files."""
        return asdict(self) | {"alterations": "\n".join(self.alterations)}

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Beside:
        """The inverse of `config`; other keys are left alone, and a key that is not there keeps its empty value."""
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        known["alterations"] = tuple(filter(None, str(known.get("alterations", "")).split("\n")))
        return cls(**known)  # type: ignore[arg-type]


NO_BESIDE = Beside()
"""Of a study that sees expression alone."""
