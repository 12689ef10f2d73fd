"""Whether a request may be answered: what the hospital's policy says of it, before any data are opened.

Every refusal says what was asked, what the policy allows, which key of policy.toml says so, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from oncofed.client.approval import Approvals, Package, check_running
from oncofed.client.consortium import pinned_coordinator
from oncofed.client.policy import ANY, PINNED, Policy
from oncofed.common.covariates import OUTCOME, parse_covariates
from oncofed.common.errors import Refusal
from oncofed.common.plan import SITE, Plan
from oncofed.common.privacy.releases import folds_of
from oncofed.common.signed_study import is_signed
from oncofed.common.study import Study

KNOWN = {*OUTCOME, SITE}
"""Columns that every study or analysis uses, and the hospital itself as a group."""


@dataclass(frozen=True)
class Admission:
    """One site's answer to the question whether to answer.

    A `simulated` site asks for no signature, approval or hour: its researcher sees every row anyway.
    """

    site: str
    policy: Policy
    folder: Path
    simulated: bool = False

    def message(self, now: datetime | None = None) -> None:
        """Refuse any message at all where the node is closed, or other code runs than the hospital approved."""
        if self.simulated:
            return
        p = self.policy
        opens = p.opening.opens(now or datetime.now(UTC))
        if opens is not None:
            raise Refusal(
                f"site {self.site}: its node is closed; it answers {', '.join(p.hours)} {p.time_zone} (hours), next from "
                f"{opens:%a %Y-%m-%d %H:%M %Z}"
            )
        if ANY not in p.versions or p.code:
            package = Package.installed()
            if ANY not in p.versions and package.version not in p.versions:
                self._refuse("versions", f"it runs oncofed {package.version}", f"answers with {_list(p.versions)}")
            if p.code and package.hash not in p.code:
                self._refuse("code", f"it runs oncofed of the code {package.hash[:16]}", "answers with other code")
        if p.approved_code:
            check_running(self.folder, self.site)

    def study(self, kind: str, study: Study, signature: str) -> None:
        """Refuse a question of a study that the policy does not allow."""
        p = self.policy
        self._asked(kind, study, signature)
        self._columns((c.column for c in parse_covariates(study.panel.covariates)), (study.task.label,))
        for key, wanted, allowed in (
            ("tasks", (study.task.kind,), p.tasks),
            ("models", (study.model.name,), p.models),
            ("modalities", study.modalities, p.modalities),
        ):
            odd = [value for value in wanted if value not in allowed]
            if odd:
                self._refuse(key, f"the study wants {_list(odd)}", f"allows {_list(allowed)}")
        self._private(study)
        phases, alone = [study.steps(phase) for phase in study.phases], study.analysis.cross_site
        if alone and not p.own_model:
            raise Refusal(
                f"site {self.site}: analysis.cross_site sends a model trained here alone to all sites, its policy does not let it "
                "(own_model)"
            )
        rounds = sum(t.rounds for t in phases) * (1 + ("local" in alone))
        rounds += study.analysis.personal_rounds * ("personalised" in alone)
        for what, count, limit in (
            ("rounds", rounds, p.max_rounds),
            ("folds", 1 if study.splits.held_out_sites else study.splits.folds, p.max_folds),
            ("local steps", max(t.local_steps for t in phases), p.max_local_steps),
        ):
            if count > limit:
                raise Refusal(f"site {self.site}: the study wants {count} {what}, the site's policy allows {limit}")
        for t in phases:
            seen = t.batch_size * t.local_steps
            if t.batch_size and seen < p.min_patients:
                raise Refusal(
                    f"site {self.site}: a round of {t.local_steps} steps with {t.batch_size} patients rests on {seen} "
                    f"patients, the site's policy wants {p.min_patients}; raise batch_size"
                )

    def plan(self, kind: str, plan: Plan, signature: str) -> None:
        """Refuse a question of an analysis that the policy does not allow."""
        p = self.policy
        self._asked(kind, plan, signature)
        self._columns((c.column for c in parse_covariates(plan.covariates)), plan.columns)
        if plan.kind not in p.analyses:
            self._refuse("analyses", f"the analysis is {plan.kind!r}", f"allows {_list(p.analyses)}")
        if p.require_secure_sum and not plan.secure_sum:
            raise Refusal(
                f"site {self.site}: the analysis lets the server see every hospital's own sums, its policy does not (require_secure_sum); set "
                "secure_sum = true"
            )
        if p.require_privacy and not plan.epsilon:
            raise Refusal(
                f"site {self.site}: the analysis has no epsilon, its policy answers none without (require_privacy); set epsilon"
            )
        if plan.epsilon > p.max_epsilon:
            self._refuse("max_epsilon", f"epsilon = {plan.epsilon:g}", f"allows {p.max_epsilon:g}")
        if plan.times == "exact" and not p.exact_times:
            raise Refusal(
                f"site {self.site}: times = 'exact' lets event times leave, its policy does not (exact_times); use times = 'grid'"
            )
        if plan.times == "grid":
            self._grid(plan)

    def _asked(self, kind: str, asked: Study | Plan, signature: str) -> None:
        """Refuse a kind of message, a name, a text that is not the coordinator's, or one that nobody approved."""
        p, what = self.policy, "analysis" if isinstance(asked, Plan) else "study"
        if kind not in p.allow:
            raise Refusal(f"site {self.site}: its policy does not answer '{kind}' (allowed: {', '.join(p.allow)})")
        if ANY not in p.studies and asked.name not in p.studies:
            self._refuse("studies", f"the {what} is '{asked.name}'", f"answers {_list(p.studies)}")
        if self.simulated:
            return
        if p.coordinators and not signature:
            self._refuse(
                "coordinators",
                f"the {what} '{asked.name}' is not signed",
                "wants a coordinator's signature; oncofed study sign",
            )
        if p.coordinators and not any(is_signed(asked, key, signature) for key in self._coordinators()):
            raise Refusal(
                f"site {self.site}: the {what} '{asked.name}' as it is asked is signed by none of the coordinators that its policy names "
                "(coordinators): it was changed after it was signed, by another version of oncofed, or the key is none of theirs any more; "
                "the coordinator must sign it again: oncofed study sign"
            )
        if p.approved_studies:
            Approvals(self.folder, self.site).check_text(asked)

    def _coordinators(self) -> list[str]:
        keys = [key for key in self.policy.coordinators if key != PINNED]
        if PINNED in self.policy.coordinators:
            try:
                pinned = pinned_coordinator(self.folder)
            except (ValueError, OSError):
                pinned = ""
            keys += [pinned] if pinned else []
        return keys

    def _columns(self, used: Iterable[str], told: Iterable[str]) -> None:
        """Refuse columns that may not be used; of those whose values are `told`, also such as may not be heard."""
        told = tuple(told)
        for column in (*used, *told):
            if ANY not in self.policy.columns and column not in KNOWN and column not in self.policy.columns:
                self._refuse("columns", f"it uses the column '{column}'", f"allows {_list(self.policy.columns)}")
        for column in told if not self.simulated else ():
            if column not in self.policy.labels:
                raise Refusal(
                    f"site {self.site}: its policy does not let values of the column '{column}' be classes (labels: "
                    f"{', '.join(self.policy.labels)}); the site's engineer can add it to labels in policy.toml"
                )

    def _private(self, study: Study) -> None:
        p, privacy = self.policy, study.privacy
        if p.require_privacy and not privacy.of_patients:
            raise Refusal(
                f"site {self.site}: the study promises privacy.unit = '{privacy.unit}', its policy answers 'patient' alone "
                "(require_privacy); set privacy.unit = 'patient'"
            )
        if p.require_secure_sum and not privacy.secure_sum:
            raise Refusal(
                f"site {self.site}: the study lets the server see every hospital's own sums, its policy does not (require_secure_sum); set "
                "privacy.secure_sum = true"
            )
        if privacy.sharing is not None and not p.shared_noise:
            raise Refusal(
                f"site {self.site}: the study has hospitals share their noise, its policy wants all of it added here (shared_noise); set "
                "privacy.noise = 'own', or have the site's engineer allow it"
            )
        # without a promise the tables of all folds add up
        epsilon = privacy.epsilon if privacy.on else study.evaluation.epsilon * folds_of(study)
        if epsilon > p.max_epsilon:
            self._refuse(
                "max_epsilon", f"the study may cost a patient epsilon {epsilon:g}", f"allows {p.max_epsilon:g}"
            )
        if privacy.on and privacy.delta > p.max_delta:
            self._refuse("max_delta", f"the study's delta is {privacy.delta:g}", f"allows {p.max_delta:g}")

    def _grid(self, plan: Plan) -> None:
        """Refuse intervals of time that would show few patients."""
        p = self.policy
        if plan.grid_months < p.min_grid_months:
            raise Refusal(
                f"site {self.site}: grid_months = {plan.grid_months:g} is finer than the {p.min_grid_months:g} that its policy wants "
                "(min_grid_months)"
            )
        if p.min_cell == 1 or plan.epsilon:
            return
        if plan.end % plan.grid_months > 1e-9 and plan.grid_months - plan.end % plan.grid_months > 1e-9:
            raise Refusal(
                f"site {self.site}: horizon_months = {plan.end:g} is no multiple of grid_months = {plan.grid_months:g}, and the last "
                "interval would be finer"
            )
        if plan.kind == "cox" and plan.ties != "breslow":
            raise Refusal(
                f"site {self.site}: Efron's ties need sums over the few events of an interval, its policy wants {p.min_cell} patients "
                "behind each (min_cell); set ties = 'breslow'"
            )

    def _refuse(self, key: str, seen: str, allowed: str) -> None:
        raise Refusal(f"site {self.site}: {seen}, its policy {allowed} ({key} in policy.toml)")


def _list(values: Iterable[str]) -> str:
    return ", ".join(map(str, values)) or "none"
