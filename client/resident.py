"""What a process keeps between messages, so that a simulation, where one process plays all sites, does not make it anew.

Nothing here is needed for a right answer: a deployed site handles every message in a new process and finds all of it empty.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from oncofed.client.data.cohort import Cohort
from oncofed.client.data.outcomes import Outcomes
from oncofed.common.blocks import Sum
from oncofed.common.models.build import Model, Sizes, build_empty
from oncofed.common.panel import GenePanel
from oncofed.common.study import Study


class Resident:
    """One model, the weights last asked about, the panels, and each site's opened cohort (memory-mapped)."""

    def __init__(self) -> None:
        self._model_key: Hashable = None
        self._model: Model | None = None
        self._weights: tuple[str, Sum, Path] = ("", {}, Path())
        self._panels: dict[Path, GenePanel] = {}
        self._cohorts: dict[Path, tuple[Hashable, Cohort]] = {}
        self._outcomes: dict[Path, tuple[Hashable, Outcomes]] = {}

    def model(self, study: Study, sizes: Sizes, device: torch.device, phase: str) -> Model:
        """A model of that shape with whatever weights it had before."""
        t = study.training
        of_study = (
            study.model,
            study.fusion,
            study.task.kind,
            study.pretraining,
            t.first_layer,
            t.adapter_rank,
            t.encoder,
            t.baselines,
            study.task.loss,
        )
        key = (of_study, sizes, device, phase)
        if self._model is None or self._model_key != key:
            self._model = build_empty(study, sizes, device, phase=phase)
            self._model_key = key
        return self._model

    def weights(self, hash_: str) -> tuple[Sum, Path] | None:
        """The weights of that hash and a file that holds them, where they were the last that were kept."""
        return self._weights[1:] if self._weights[0] == hash_ else None

    def keep_weights(self, hash_: str, weights: Sum, file: Path) -> None:
        """Keep weights in place of those before."""
        self._weights = hash_, weights, file

    def panel(self, file: Path) -> GenePanel:
        """The panel in `file`; files are named by their panel's hash and never change."""
        if file not in self._panels:
            self._panels[file] = GenePanel.of_lines(file.read_text().splitlines())
        return self._panels[file]

    def cohort(self, work: Path, key: Hashable, open_: Callable[[], Cohort]) -> Cohort:
        """The cohort last opened below `work` while its key stays the same: one for each site, whatever was studied."""
        known = self._cohorts.get(work)
        if known is None or known[0] != key:
            self._cohorts[work] = known = (key, open_())
        return known[1]

    def outcomes(self, work: Path, key: Hashable, read: Callable[[], Outcomes]) -> Outcomes:
        """The patients that an analysis last saw at the site of `work`, while its key stays the same."""
        known = self._outcomes.get(work)
        if known is None or known[0] != key:
            self._outcomes[work] = known = (key, read())
        return known[1]
