"""The kinds of data that a patient may have or lack, and what sites must agree on about images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


def agree(images: Mapping[str, str]) -> str:
    """The one description (`Images.text`) that all sites with images give, empty without any; raises naming the sites."""
    by_text: dict[str, list[str]] = {}
    for site, text in images.items():
        if text:
            by_text.setdefault(text, []).append(site)
    if len(by_text) > 1:
        listed = "; ".join(f"{text}: {', '.join(sorted(sites))}" for text, sites in sorted(by_text.items()))
        raise ValueError(
            f"sites hold images that one model cannot read ({listed}); encode the slides with one encoder, or leave "
            "pathology out with fusion.modalities"
        )
    return next(iter(by_text), "")
