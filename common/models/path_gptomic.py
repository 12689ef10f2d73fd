"""Path-GPTOmic (Wang et al., ISBI 2024, arXiv 2403.11375): RNA and pathology in one unbounded log hazard.

Each modality has an encoder and a linear risk of its own; a patient's log hazard is the sum over the modalities that are
there (eq. 2 of the paper, with absent terms left out). An encoder sees only patients who have its modality, so the
others give it no gradient and no evidence. Shapes: B patients, Z latent, C cancer types, V covariates, K intervals.
"""

from __future__ import annotations

import torch
from oncofed.common.blocks import Blocks
from oncofed.common.modalities import ALTERATIONS, PATHOLOGY, RNA
from oncofed.common.models.branches import AlterationEncoder, TileEncoder
from oncofed.common.models.gene_moe import Encoder, Off, cancer_blocks
from oncofed.common.models.heads import Covariates, LinearRisk
from oncofed.common.models.inputs import Inputs
from oncofed.common.models.layers import balance_penalty
from oncofed.common.models.output import ModelOutput
from torch import Tensor, nn

JOINT = "joint"
"""The features of all modalities together, where they are concatenated."""

Branch = Encoder | TileEncoder | AlterationEncoder


class FusionHead(nn.Module):
    """Linear risks by modality (or one of the joint features), clinical covariates, and log baselines [C, K]."""

    def __init__(self, risks: dict[str, LinearRisk], *, cancers: int, intervals: int, covariates: int) -> None:
        super().__init__()
        self.risks = nn.ModuleDict(risks)
        self.covariates = Covariates(covariates, 1, cancers) if covariates else None
        self.log_baseline = nn.Parameter(torch.zeros(cancers, intervals))

    def forward(self, cancer_B: Tensor) -> Tensor:
        """The log baseline of each patient's cancer type `[B, K]`."""
        return self.log_baseline[cancer_B]


class PathGPTOmic(nn.Module):
    """Encoders by modality and their risks -> `ModelOutput` whose `branches` hold each modality's log hazard.

    The RNA encoder is called `encoder`, as in Gene-MOE, so that a pre-trained one fits. With `joint`, a perceptron over the
    features of all modalities, absent ones at 0, takes the place of the sum.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        branches: dict[str, Branch],
        joint: nn.Linear | None,
        head: FusionHead,
        cancers: tuple[str, ...],
        *,
        modality_dropout: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.branches = nn.ModuleDict(branches)
        self.joint, self.head, self.cancers = joint, head, cancers
        self.modality_dropout = modality_dropout
        self.still = False
        """Whether the encoders are frozen: then they have no noise in training either, though patients may lose modalities."""
        self.in_step = False
        """Whether all patients pass all encoders, absent modalities at weight 0: then row b of every layer is patient b, as
        gradients by patient want it. The numbers are the same."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return (*((RNA,) if self.encoder is not None else ()), *self.branches)

    @property
    def additive(self) -> bool:
        """Whether the log hazard is a sum over modalities."""
        return self.joint is None

    def forward(self, inputs: Inputs, generator: torch.Generator | None = None, off: Off | None = None) -> ModelOutput:
        """Training noise is drawn from `generator`; `off` takes out an expert, or a modality: `("pathology", 0)`."""
        n, zeros = len(inputs.cancer_B), inputs.v_BV.new_zeros
        present = self._present(inputs, generator, off)
        generator = None if self.still else generator
        # Nothing is run for patients who lack a modality, so they give it no gradient.
        features = {m: zeros(n, latent_of(self._branch(m))) for m in self.modalities}
        shares = {group: zeros(n, experts) for group, experts in self.mixtures().items()}
        logits, attention_T = dict(shares), None
        for modality in self.modalities:
            there_B = present[modality]
            rows = torch.nonzero(torch.ones_like(there_B) if self.in_step else there_B).squeeze(1)
            if modality == RNA and len(rows):
                assert self.encoder is not None
                encoded = self.encoder(inputs.x_BG[rows], inputs.cancer_B[rows], generator, off)
                shares = {group: _scatter(rows, v, n) for group, v in encoded.shares.items()}
                logits = {group: _scatter(rows, v, n) for group, v in encoded.logits.items()}
                features[RNA] = _scatter(rows, encoded.score, n)
            elif modality == ALTERATIONS and len(rows):
                assert inputs.alteration_BA is not None
                z = self.branches[modality](inputs.alteration_BA[rows], generator)
                features[modality] = _scatter(rows, z, n)
            elif modality == PATHOLOGY and len(rows):
                z, attention_T = self._pathology(inputs, rows, generator)
                features[modality] = _scatter(rows, z, n)
            if self.in_step:
                features[modality] = features[modality] * there_B[:, None]
                if modality == RNA:
                    shares = {group: share_BE * there_B[:, None] for group, share_BE in shares.items()}
        latent = torch.cat(list(features.values()), dim=1)
        branches: dict[str, Tensor] = {}
        if self.joint is None:
            for m, z_BZ in features.items():
                branches[m] = self.head.risks[m](z_BZ, inputs.cancer_B) * present[m]
            score = torch.stack(list(branches.values())).sum(0)
        else:
            score = self.head.risks[JOINT](torch.tanh(self.joint(latent)), inputs.cancer_B)
        if self.head.covariates is not None:
            score = score + self.head.covariates(inputs.v_BV, inputs.cancer_B).squeeze(-1)
        mask = {m: there.to(score.dtype) for m, there in present.items()}
        return ModelOutput(score, latent, shares, logits, branches, mask, attention_T, self.head(inputs.cancer_B))

    def _present(self, inputs: Inputs, generator: torch.Generator | None, off: Off | None) -> dict[str, Tensor]:
        """Who has which modality `[B]`; in training some patients lose one of several at random."""
        has = {m: inputs.has[m].bool() for m in self.modalities}
        if off is not None and off[0] in has:
            has[off[0]] = torch.zeros_like(has[off[0]])
        if generator is None or not self.modality_dropout or len(has) < 2:
            return has
        mask_BM = torch.stack(list(has.values()), dim=1)
        device = mask_BM.device
        draw_BM = torch.rand(mask_BM.shape, generator=generator, device=device).masked_fill(~mask_BM, -1.0)
        loses_B = torch.rand(len(mask_BM), generator=generator, device=device) < self.modality_dropout
        loses_B &= mask_BM.sum(1) > 1
        lost_BM = torch.nn.functional.one_hot(draw_BM.argmax(1), mask_BM.shape[1]).bool() & loses_B[:, None]
        return dict(zip(has, (mask_BM & ~lost_BM).unbind(1), strict=True))

    def _pathology(
        self, inputs: Inputs, rows: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Latent of those `rows` that have images and, of tiles, the attention `[T]`, 0 on tiles of other patients."""
        branch = self.branches[PATHOLOGY]
        if isinstance(branch, Encoder):
            assert inputs.image_BP is not None
            return branch(inputs.image_BP[rows], inputs.cancer_B[rows], generator).score, None
        assert inputs.tiles_TP is not None
        assert inputs.owner_T is not None
        place_B = rows.new_full((len(inputs.cancer_B),), -1)
        place_B[rows] = torch.arange(len(rows), device=rows.device)
        seen = torch.nonzero(place_B[inputs.owner_T] >= 0).squeeze(1)
        assert isinstance(branch, TileEncoder)
        z, a_T = (branch.in_step if self.in_step else branch)(
            inputs.tiles_TP[seen], place_B[inputs.owner_T[seen]], len(rows), generator
        )
        return z, _scatter(seen, a_T.detach(), len(inputs.owner_T))

    def _branch(self, modality: str) -> Branch:
        return self.encoder if modality == RNA else self.branches[modality]  # type: ignore[return-value]

    def penalty(self, output: ModelOutput, load: dict[str, Tensor]) -> Tensor:
        """Balance loss `[B]` of the RNA encoder's mixtures against the federation's load; 0 for patients without RNA."""
        terms = [balance_penalty(output.logits[g], load[g]) for g in output.logits]
        return torch.stack(terms).sum(0) * output.present[RNA]

    def mixtures(self) -> dict[str, int]:
        """Experts in each mixture of the RNA encoder."""
        return self.encoder.mixtures() if self.encoder is not None else {}

    def removable(self) -> dict[str, int]:
        """Experts, and modalities where there are several, that can be taken out."""
        experts = self.encoder.removable() if self.encoder is not None else {}
        return experts | (dict.fromkeys(self.modalities, 1) if len(self.modalities) > 1 else {})

    def blocks(self) -> Blocks:
        """One block a modality and, for its rows by cancer type, a block of each cancer's patients who have it.

        Baselines, covariates and joint layers belong to all patients; experts are blocks of their own.
        """
        all_patients = cancer_blocks(self.cancers)
        owners: dict[str, str | tuple[str, ...]] = {}
        for name, p in self.named_parameters():
            if name.startswith("encoder."):
                assert self.encoder is not None
                by_cancer = cancer_blocks(self.cancers, RNA)
                owners[name] = self.encoder.owner(name.removeprefix("encoder."), len(p), by_cancer, trunk=RNA)
            elif (modality := self.modality_of(name)) is not None:
                owners[name] = cancer_blocks(self.cancers, modality) if name.endswith(".own") else modality
            elif name.endswith((".own", ".log_baseline")):
                owners[name] = all_patients
            else:
                owners[name] = "trunk"
        return Blocks(owners)

    def modality_of(self, parameter: str) -> str | None:
        """The modality whose encoder or risk a parameter belongs to; None for what all patients share."""
        first, *rest = parameter.split(".")
        named = {"encoder": RNA, "branches": rest[0], "head": rest[1] if rest[0] == "risks" else None}.get(first)
        return None if named == JOINT else named


def latent_of(encoder: Branch) -> int:
    """Length of an encoder's latent vector."""
    if isinstance(encoder, Encoder):
        return encoder.settings.latent
    if isinstance(encoder, TileEncoder):
        return encoder.latent.out_features
    return encoder.layers[-1].out_features  # type: ignore[return-value]


def _scatter(rows: Tensor, values: Tensor, length: int) -> Tensor:
    """`values` at their rows among `length`, zeros elsewhere."""
    return values.new_zeros(length, *values.shape[1:]).index_copy(0, rows, values)
