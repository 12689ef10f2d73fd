"""Gradient modulation in a site's local steps: who leads in this batch, and how fast each encoder may learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from oncofed.client.batch import Batch
from oncofed.common.models.output import ModelOutput
from oncofed.common.models.path_gptomic import PathGPTOmic
from oncofed.common.modulation import COLUMNS, likelihood_lead, rate_factors, risk_set_lead
from oncofed.common.study import Study
from oncofed.common.survival import piecewise_exponential_loss
from torch import Tensor

LEAD, PAIRS = COLUMNS.index("lead"), COLUMNS.index("pairs")


class Modulation:
    """One round at one site. `table [M, len(COLUMNS)]` sums over the steps what the round's log and the federation need.

    The factor multiplies the learning rate of an encoder's parameters and not their gradient, which Adam would divide
    out again (path_gptomic.md, 1.3). Groups of `optimizer` name their modality.
    """

    def __init__(
        self, study: Study, optimizer: torch.optim.Optimizer, last: np.ndarray | None, modalities: tuple[str, ...]
    ):
        self.study, self.optimizer, self.modalities = study, optimizer, modalities
        self.last = np.zeros((len(modalities), len(COLUMNS))) if last is None else last
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.table = np.zeros((len(modalities), len(COLUMNS)))
        self._lead, self._pairs = np.zeros(len(modalities)), 0.0

    def step(self, model: PathGPTOmic, output: ModelOutput, batch: Batch) -> None:
        """Set the rates of the step to come, and add what it shows to the table."""
        risk_BM = torch.stack([output.branches[m].detach() for m in self.modalities], dim=1)
        mask_BM = torch.stack([output.present[m] for m in self.modalities], dim=1)
        whole = torch.nonzero(mask_BM.all(1)).squeeze(1)
        lead_M = self._measure(model, risk_BM[whole], replace(batch, bags=None).select(whole))
        factor_M = self._factors(lead_M, len(whole))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            modality = group.get("modality")
            group["lr"] = rate * (factor_M[self.modalities.index(modality)] if modality else 1.0)
        n_M = mask_BM.sum(0).double().cpu().numpy()
        risk, squares = (t.double().sum(0).cpu().numpy() for t in (risk_BM, risk_BM.square()))
        self.table += np.stack([n_M, risk, squares, np.full(len(n_M), len(whole)), lead_M, factor_M * n_M], axis=1)

    def _measure(self, model: PathGPTOmic, risk_BM: Tensor, batch: Batch) -> np.ndarray:
        """The lead of each modality among patients who have them all `[M]`."""
        f, task = self.study.fusion, self.study.task
        kind = f.modulation_ratio
        if kind == "auto":
            kind = "risk_set" if task.loss == "cox" else "likelihood"

        def losses(risk_B: Tensor) -> Tensor:
            baseline_BK = model.head.log_baseline.detach()[batch.cancer_B]
            return piecewise_exponential_loss(risk_B, baseline_BK, batch.exposure_BK, batch.interval_B, batch.event_B)

        lead = []
        for risk_B in risk_BM.unbind(1):
            if kind == "likelihood":
                each = likelihood_lead(losses(risk_B), losses(torch.zeros_like(risk_B)))
            else:
                each = risk_set_lead(risk_B, batch.time_B, batch.event_B, batch.cancer_B, literal=kind == "literal")
            lead.append(float(each.sum()))
        return np.array(lead)

    def _factors(self, lead_M: np.ndarray, pairs: int) -> np.ndarray:
        f = self.study.fusion
        if f.modulation == "none" or f.kind != "additive":
            return np.ones(len(self.modalities))
        if f.modulation == "federated":  # all sites go by what all sites saw in the round before
            return rate_factors(self.last[:, LEAD], float(self.last[0, PAIRS]), f.modulation_floor)
        self._lead = f.modulation_memory * self._lead + lead_M
        self._pairs = f.modulation_memory * self._pairs + pairs
        return rate_factors(self._lead, self._pairs, f.modulation_floor)
