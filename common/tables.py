"""The tables of numbers that a study brings to one scale: expression, image vectors, alterations."""

from __future__ import annotations

from oncofed.common.modalities import ALTERATIONS, PATHOLOGY, RNA, Beside
from oncofed.common.study import Study

CLASSES = "classes"
"""The name of the sum of training patients by class, in messages."""


def table_widths(study: Study, beside: Beside, genes: int) -> dict[str, int]:
    """Numbers of a patient in each table of a study, by modality; tiles are no table."""
    width = {
        RNA: beside.embedding_width or genes,
        PATHOLOGY: beside.image_width if beside.image_kind == "vector" else 0,
        ALTERATIONS: len(beside.alterations),
    }
    return {m: width[m] for m in study.modalities if width[m]}


def scale_prefix(modality: str) -> str:
    """Before the names of a table's scale in messages and files."""
    return "scaling/" if modality == RNA else f"scaling-{modality}/"


def sum_prefix(modality: str) -> str:
    """Before the names of a table's sums in the statistics."""
    return "" if modality == RNA else f"{modality}/"
