"""All checks of an audit, and the gate that a release must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oncofed.common import wire
from oncofed.common.privacy.releases import TOLERANCE
from oncofed.common.progress import progress_bar
from oncofed.common.study import Study
from oncofed.deploy.audit.canary import audit_canaries
from oncofed.deploy.audit.inversion import audit_inversion
from oncofed.deploy.audit.membership import audit_membership
from oncofed.deploy.audit.sensitivity import ROUNDING, measure_sensitivity
from oncofed.deploy.audit.setting import Setting, open_setting

CHECKS = ("sensitivity", "canary", "membership", "inversion")


def audit(
    study: Study, sites: Path, checks: tuple[str, ...] = CHECKS, *, models: int = 32, seed: int = 0, site: str = ""
) -> dict[str, Any]:
    """Attack a study over the site folders below `sites`; no patient's numbers are in what comes back.

    The gate fails where a patient moves a sum further than the clip, where what a site releases shows more than is claimed or is
    not covered as is claimed, and where the noise comes to more than the study promises.
    """
    odd = [check for check in checks if check not in CHECKS]
    if odd or not checks:
        raise ValueError(f"--checks {','.join(odd) or '(none)'}: choose from {','.join(CHECKS)}")
    with progress_bar() as progress:
        ticks = {"membership": 2 * models}
        bar = progress.add_task("audit", total=1 + sum(ticks.get(check, 1) for check in checks))
        setting = open_setting(sites, study, site)
        progress.advance(bar)
        result: dict[str, Any] = {
            "claim": claim_of(setting),
            "study": study.model_dump(mode="json", exclude={"runtime"}),
        }
        result |= {"sites": list(setting.sites), "fold": setting.fold, "patients": len(setting.batch), "seed": seed}
        for check in checks:
            if check == "sensitivity":
                result[check] = measure_sensitivity(setting, seed)
            elif check == "canary":
                result[check] = audit_canaries(setting, seed)
            elif check == "membership":
                result[check] = audit_membership(setting, models, seed, lambda: progress.advance(bar))
            else:
                result[check] = audit_inversion(setting, seed)
            progress.advance(bar, 0 if check == "membership" else 1)
    return result | {"gate": gate(result)}


def claim_of(setting: Setting) -> dict[str, Any]:
    """What the study says of itself: epsilon and delta of everything, the unit, and what one fold's training takes of it."""
    p = setting.study.privacy
    return {
        "unit": p.unit,
        "epsilon": p.epsilon,
        "delta": p.delta,
        "accounted": setting.promise.epsilon,
        "epsilon_of_a_fold": setting.epsilon(setting.steps),
        "steps_of_a_fold": setting.steps,
        "clip": p.clip,
        "deviation": setting.promise.deviation,
        "sample_rate": p.sample_rate,
        "accountant": p.accountant,
        "package": wire.package_version(),
    }


def gate(result: dict[str, Any]) -> dict[str, Any]:
    """What fails a release, and what should be looked into."""
    failed, alarms = [], []
    claim = result["claim"]
    if claim["accounted"] > claim["epsilon"] * (1 + TOLERANCE):
        failed.append(f"the noise comes to epsilon {claim['accounted']:.3f}, the study promises {claim['epsilon']:g}")
    sensitivity, canary = result.get("sensitivity"), result.get("canary")
    single = sensitivity.get("single", {}) if sensitivity else {}
    if single and single["largest"] > single["limit"]:
        failed.append(
            f"one patient moves a sum by {single['largest']:.6g} clips in single precision ({single['worst']})"
        )
    if sensitivity and max(sensitivity["largest"]) > sensitivity["limit"]:
        failed.append(f"one patient moves a sum by {max(sensitivity['largest']):.3f} clips, 1 is what noise covers")
    elif sensitivity and sensitivity["others"] > ROUNDING:
        failed.append(f"one patient moves the gradients of others by {sensitivity['others']:.3g} clips")
    if canary and canary["quiet_parameters"]:
        named = ", ".join(canary["quiet_parameters"][:3])
        failed.append(f"{len(canary['quiet_parameters'])} parameters have less noise than is claimed ({named})")
    if canary and canary["epsilon_lower_gate"] > canary["epsilon"]:
        failed.append(
            f"canaries show epsilon {canary['epsilon_lower_gate']:.2f} or more, {canary['epsilon']:.2f} is claimed for {canary['steps']} steps"
        )
    if canary and canary.get("loud_parameters"):
        named = ", ".join(canary["loud_parameters"][:3])
        failed.append(f"{len(canary['loud_parameters'])} parameters carry more than sum and noise ({named})")
    failed += canary.get("wrong", []) if canary else []
    if canary and canary["alarm"]:
        alarms.append(
            f"one run shows epsilon {canary['epsilon_lower_one_run']:.2f}, {canary['epsilon']:.2f} is claimed"
        )
    if "membership" in result and result["membership"]["alarm"]:
        alarms.append("an attack finds more members at 1 % false alarms than epsilon allows")
    return {"passed": not failed, "failed": failed, "alarms": alarms}
