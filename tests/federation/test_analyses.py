"""Classical analyses over hospitals, message by message: equal to pooled, and closed where a policy says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message, RecordDict
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.statistics import logrank_test, multivariate_logrank_test
from oncofed.client.app import app as client_app
from oncofed.client.release import Answer, Door
from oncofed.common import wire
from oncofed.common.blocks import Sum
from oncofed.common.metrics import pair_counts
from oncofed.common.plan import Plan
from oncofed.deploy.analyse import analyse
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.roster import NotEnoughSites
from toy_outcomes import analyse_at_hospitals, deal, rossi

COVARIATES = ("fin", "age", "race", "wexp", "mar", "paro", "prio")
TIGHT = {"precision": 1e-14}


def owners(n: int, sites: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, sites, n)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return rossi()


@pytest.mark.parametrize("sites", [1, 3, 20])
def test_cox_over_any_number_of_sites_is_the_pooled_one(table: pd.DataFrame, sites: int, tmp_path: Path) -> None:
    owner = owners(len(table), sites, sites)
    owner[table["event"] == 1] %= max(1, sites - 1)  # a site without any event
    root = deal(table, owner, tmp_path / "sites")
    plan = Plan(kind="cox", covariates=COVARIATES, times="exact", min_sites=1, out=str(tmp_path / "out"))
    found = analyse(plan, root)["cox"]
    pooled = CoxPHFitter().fit(table[["time", "event", *COVARIATES]], "time", "event", fit_options=TIGHT)
    np.testing.assert_allclose(found["coef"], pooled.params_, rtol=1e-10)
    np.testing.assert_allclose(found["loglik"], pooled.log_likelihood_, rtol=1e-12)
    np.testing.assert_allclose(found["se"], pooled.standard_errors_, rtol=1e-7)
    assert (found["patients"], found["events"]) == (432, 114)


def test_twenty_sites_and_one_agree_to_ten_digits(table: pd.DataFrame, tmp_path: Path) -> None:
    """What fixed-point sums and another split cost: nothing that anybody sees."""
    plan = Plan(kind="cox", covariates=COVARIATES, times="exact", robust=True, min_sites=1, out=str(tmp_path / "out"))
    one, many = (analyse(plan, deal(table, owners(len(table), n), tmp_path / f"sites-{n}"))["cox"] for n in (1, 20))
    for key in ("coef", "se", "robust_se", "loglik"):
        np.testing.assert_allclose(many[key], one[key], rtol=1e-10, err_msg=key)


def test_strata_by_site_are_fits_of_each_sites_own_risk_sets(table: pd.DataFrame, tmp_path: Path) -> None:
    owner = owners(len(table), 4)
    root = deal(table, owner, tmp_path / "sites")
    plan = Plan(kind="cox", covariates=("fin", "age"), strata=("site",), times="exact", out=str(tmp_path / "out"))
    found = analyse(plan, root)["cox"]
    frame = table[["time", "event", "fin", "age"]].assign(site=owner)
    pooled = CoxPHFitter(strata=["site"]).fit(frame, "time", "event", fit_options=TIGHT)
    np.testing.assert_allclose(found["coef"], pooled.params_, rtol=1e-9)
    assert {row["stratum"] for row in found["baseline"]} == {f"Site {i}" for i in range(4)}


def test_curves_and_log_rank_are_the_pooled_ones(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 7), tmp_path / "sites")
    result = analyse(Plan(kind="km", group="fin", times="exact", out=str(tmp_path / "out")), root)
    for value, curve in enumerate(result["curves"]):
        rows = table[table["fin"] == value]
        km = KaplanMeierFitter().fit(rows["time"], rows["event"])
        wanted = km.survival_function_at_times(curve["time"]).to_numpy()
        np.testing.assert_allclose(curve["survival"], wanted, atol=1e-12)
        assert curve["patients"] == len(rows)
    a, b = (table[table["fin"] == v] for v in (0, 1))
    test = logrank_test(a["time"], b["time"], a["event"], b["event"])
    assert result["logrank"]["chi2"] == pytest.approx(test.test_statistic, rel=1e-12)
    assert (tmp_path / "out" / "analysis.html").exists()


def test_levels_of_different_spelling_are_one_and_a_filter_chooses(table: pd.DataFrame, tmp_path: Path) -> None:
    owner = owners(len(table), 2)
    text = np.where(table["wexp"] == 1, np.where(owner == 0, "Yes", "YES"), "no")
    root = deal(table.assign(work=text, old=np.where(table["age"] > 25, "old", "young")), owner, tmp_path / "sites")
    plan = Plan(kind="logrank", group="work", where=("old=old",), times="exact", out=str(tmp_path / "out"))
    found = analyse(plan, root)["logrank"]
    rows = table[table["age"] > 25]
    test = multivariate_logrank_test(rows["time"], rows["wexp"], rows["event"])
    assert found["groups"] == ["no", "Yes"]
    assert found["chi2"] == pytest.approx(test.test_statistic, rel=1e-12)


def test_a_site_that_fails_is_left_out_of_all_steps(table: pd.DataFrame, tmp_path: Path) -> None:
    """Its first steps would else be in the scale of the covariates, and not in the fit."""
    owner = owners(len(table), 3)
    root = deal(table, owner, tmp_path / "sites")
    bad = pd.read_csv(root / "site-2" / "clinical.csv").drop(columns="age")
    bad.to_csv(root / "site-2" / "clinical.csv", index=False)
    plan = Plan(kind="cox", covariates=("fin", "age"), times="exact", out=str(tmp_path / "out"))
    result = analyse(plan, root)
    rows = table[owner < 2]
    pooled = CoxPHFitter().fit(rows[["time", "event", "fin", "age"]], "time", "event", fit_options=TIGHT)
    np.testing.assert_allclose(result["cox"]["coef"], pooled.params_, rtol=1e-9)
    assert result["sites"] == ["Site 0", "Site 1"]
    assert "Site 2" in {x["site"] for x in result["left_out"]}


# -- behind policies -------------------------------------------------------------------------------------------------------


def test_hospitals_do_not_let_exact_times_out_unless_they_say_so(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites")
    plan = Plan(kind="km", times="exact", out=str(tmp_path / "out"))
    with pytest.raises(NotEnoughSites, match=r"lets event times leave, its policy does not \(exact_times\)"):
        analyse_at_hospitals(plan, root, tmp_path / "work")
    for folder in root.iterdir():
        (folder / "policy.toml").write_text("exact_times = true\n")
    result = analyse_at_hospitals(plan, root, tmp_path / "work")
    km = KaplanMeierFitter().fit(table["time"], table["event"])
    curve = result["curves"][0]
    np.testing.assert_allclose(curve["survival"], km.survival_function_at_times(curve["time"]), atol=1e-12)


def test_a_column_that_the_hospital_did_not_name_is_not_grouped_by(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites")
    plan = Plan(kind="km", group="fin", out=str(tmp_path / "out"))
    with pytest.raises(NotEnoughSites, match="'fin' be classes"):
        analyse_at_hospitals(plan, root, tmp_path / "work")


def test_curves_behind_policies_are_coarser_and_hardly_off(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 4), tmp_path / "sites", 'labels = ["fin"]\n')
    plan = Plan(kind="km", group="fin", grid_months=2, horizon_months=48, out=str(tmp_path / "out"))
    result = analyse_at_hospitals(plan, root, tmp_path / "work")
    assert "intervals of time together" in " ".join(result["notes"])
    for value, curve in enumerate(result["curves"]):
        rows = table[table["fin"] == value]
        wanted = KaplanMeierFitter().fit(rows["time"], rows["event"]).survival_function_at_times(curve["time"])
        off = np.abs(np.array(curve["survival"]) - wanted.to_numpy())
        assert off.mean() < 0.025
        assert off.max() < 0.08


def sent_by(site: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sum]]:
    """What leaves a site from now on: step and sum."""
    sent: list[tuple[str, Sum]] = []
    release = Door.release

    def listen(door: Door, kind: str, stamp: wire.Config, answer: Answer) -> RecordDict:
        content = release(door, kind, stamp, answer)
        if door.site == site:
            sent.append((str(stamp["step"]), wire.read_arrays(content)))
        return content

    monkeypatch.setattr(Door, "release", listen)
    return sent


def test_a_cox_regression_behind_policies_tells_of_runs_alone(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = deal(table, owners(len(table), 3), tmp_path / "sites")
    keys = {"covariates": ("fin", "age", "prio"), "grid_months": 2.0, "horizon_months": 52.0, "ties": "breslow"}
    plan = Plan(kind="cox", out=str(tmp_path / "out"), **keys)  # type: ignore[arg-type]
    sent = sent_by("Site 0", monkeypatch)
    behind = analyse_at_hospitals(plan, root, tmp_path / "work")["cox"]
    open_ = analyse(plan, root)["cox"]
    # coarser times cost less than the standard error
    off = np.abs(np.array(behind["coef"]) - np.array(open_["coef"])) / np.array(open_["se"])
    assert off.max() < 1.0
    assert behind["proportional_hazards"] is None
    (newton, *_) = [s for step, s in sent if step == "cox"]
    weights = newton["left/0"][0]
    # in all cells of a run the mean of the covariates is the run's: there are as many as runs
    means = newton["left/1"][0][weights > 0] / weights[weights > 0, None]
    assert len(np.unique(means.round(6), axis=0)) <= (owners(len(table), 3) == 0).sum() // 41
    assert np.count_nonzero(newton["event_x"][0].any(axis=1)) == 1
    mine = table[owners(len(table), 3) == 0]
    assert weights.sum() == pytest.approx(len(mine))  # at coefficients of 0


def test_efrons_ties_would_tell_of_single_events_and_are_refused(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites")
    plan = Plan(kind="cox", covariates=("age",), horizon_months=51, out=str(tmp_path / "out"))
    with pytest.raises(NotEnoughSites, match="set ties = 'breslow'"):
        analyse_at_hospitals(plan, root, tmp_path / "work")


def test_coefficients_that_single_out_a_patient_get_no_answer(table: pd.DataFrame, tmp_path: Path) -> None:
    """With a weight of exp(5 years) all of a run's sum is its oldest men's."""
    root = deal(table, owners(len(table), 2), tmp_path / "sites")
    plan = Plan(kind="cox", covariates=("age",), ties="breslow", horizon_months=51, out=str(tmp_path / "out"))
    asked = {"mean": np.array([24.0]), "sd": np.array([1.0])}
    fine = ask_site(plan, root / "site-0", tmp_path / "work", "cox", asked | {"beta": np.array([0.05])})
    assert "arrays" in fine.array_records
    told = ask_site(plan, root / "site-0", tmp_path / "work", "cox", asked | {"beta": np.array([5.0])})
    assert "fewer than 11 patients would outweigh" in str(told.config_records["from"]["refusal"])


def test_newton_steps_about_one_group_are_counted(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites", "max_newton_steps = 3\n")
    plan = Plan(kind="cox", covariates=("age",), ties="breslow", horizon_months=51, out=str(tmp_path / "out"))
    asked = {"mean": np.array([24.0]), "sd": np.array([6.0]), "beta": np.zeros(1)}
    answers = [ask_site(plan, root / "site-0", tmp_path / "work", "cox", asked) for _ in range(4)]
    assert ["arrays" in a.array_records for a in answers] == [True, True, True, False]


COX = {"kind": "cox", "covariates": ("age", "prio"), "ties": "breslow", "horizon_months": 51.0}
ASKED = {"mean": np.array([24.0, 3.0]), "sd": np.array([6.0, 3.0]), "beta": np.zeros(2)}


@pytest.mark.parametrize(
    ("step", "change", "said"),
    [
        ("moments", {"mean": np.zeros((11, 1, 2))}, r"finite numbers 'mean' of shape \(2,\), got shape \(11, 1, 2\)"),
        ("moments", {"sd": np.full((216, 2), np.inf)}, "'sd' has numbers that are not finite"),
        ("cox", {"sd": np.array([6.0, -1.0])}, "do not bring its covariates to one scale"),
        ("cox", {"sd": np.array([6.0, 1e-300])}, "do not bring its covariates to one scale"),
        ("cox", {"beta": np.array([0.0, np.nan])}, "'beta' has numbers that are not finite"),
        ("risks", {}, "cells of single patients"),
        ("scores", {"risk_edges": np.zeros((1, 3)), "time_edges": np.arange(3.0)}, "cells of single patients"),
        ("residuals", {}, "which can single out a patient"),
        ("pairs", {}, "names no test patients"),
        ("table", {}, "a plan of kind cox has no step 'table'"),
        ("times", {}, "times = 'exact' only"),
    ],
)
def test_a_coordinator_who_asks_for_rows_gets_none(
    table: pd.DataFrame, tmp_path: Path, step: str, change: Sum, said: str
) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites")
    told = ask_site(Plan(**COX), root / "site-0", tmp_path / "work", step, ASKED | change)  # type: ignore[arg-type]
    assert "arrays" not in told.array_records
    assert re.search(said, str(told.config_records["from"]["refusal"]))


def test_two_horizons_do_not_tell_who_died_between_them(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites")
    asked = [
        ask_site(Plan(kind="km", horizon_months=h), root / "site-0", tmp_path / "work", "table", {})
        for h in (30, 33, 51)
    ]
    assert ["arrays" in a.array_records for a in asked] == [True, False, True]
    assert "patients with the event who differ" in str(asked[1].config_records["from"]["refusal"])


def test_two_grids_do_not_tell_finer_times_than_one(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites")
    plans = [Plan(kind="km", grid_months=g, horizon_months=48) for g in (3.0, 2.0, 0.5)]
    asked = [ask_site(p, root / "site-0", tmp_path / "work", "table", {}) for p in plans]
    assert ["arrays" in a.array_records for a in asked] == [True, False, False]
    odd = ask_site(Plan(kind="km", horizon_months=50), root / "site-0", tmp_path / "work", "table", {})
    assert "no multiple of grid_months" in str(odd.config_records["from"]["refusal"])


def test_whether_one_is_there_or_none_is_told_in_the_same_words(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(
        table.assign(town=np.where(table.index == 0, "Oslo", "Rome")),
        owners(len(table), 1),
        tmp_path / "sites",
        'labels = ["town"]\n',
    )
    said = set()
    for town in ("Oslo", "Bern"):
        plan = Plan(kind="km", where=(f"town={town}",))
        said.add(str(ask_site(plan, root / "site-0", tmp_path / "work", "table", {}).config_records["from"]["refusal"]))
    assert len(said) == 1
    noisy = Plan(kind="km", where=("town=Bern",), epsilon=1.0)
    assert "arrays" in ask_site(noisy, root / "site-0", tmp_path / "work", "table", {}).array_records


def test_the_release_log_names_step_and_plan(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 1), tmp_path / "sites")
    ask_site(Plan(kind="km", horizon_months=51), root / "site-0", tmp_path / "work", "table", {})
    line = json.loads((tmp_path / "work" / "release-log.jsonl").read_text().splitlines()[-1])
    assert (line["analysis"], line["step"]) == ("analysis", "table")
    assert json.loads((tmp_path / "work" / "plans" / f"{line['plan']}.json").read_text())["horizon_months"] == 51


def test_a_fit_is_evaluated_on_a_site_that_it_has_not_seen(table: pd.DataFrame, tmp_path: Path) -> None:
    """External validation; follow-up ends at the horizon, and pairs are within strata."""
    owner = owners(len(table), 3)
    root = deal(table, owner, tmp_path / "sites")
    keys = {"times": "exact", "horizon_months": 40.0, "strata": ("fin",), "out": str(tmp_path / "out")}
    plan = Plan(kind="cox", covariates=("age", "prio"), test=("site=Site 2",), **keys)  # type: ignore[arg-type]
    result = analyse(plan, root)
    cut = table.assign(event=table["event"] * (table["time"] <= 40), time=table["time"].clip(upper=40))
    fitted, tested = cut[owner < 2], cut[owner == 2]
    pooled = CoxPHFitter(strata=["fin"]).fit(
        fitted[["time", "event", "age", "prio", "fin"]], "time", "event", fit_options=TIGHT
    )
    np.testing.assert_allclose(result["cox"]["coef"], pooled.params_, rtol=1e-8)
    risk = tested[["age", "prio"]].to_numpy() @ pooled.params_.to_numpy()
    counts = np.zeros(2)
    for value in (0, 1):
        rows = (tested["fin"] == value).to_numpy()
        counts += pair_counts(risk[rows], tested["time"].to_numpy()[rows], tested["event"].to_numpy()[rows])
    found = result["evaluation"]
    assert found["c_index_within_sites"]["pairs"] == counts[1]
    assert found["c_index_within_sites"]["value"] == pytest.approx(counts[0] / counts[1])
    assert found["c_index"]["value"] == pytest.approx(counts[0] / counts[1], abs=0.01)
    assert list(found["by_site"]) == ["Site 2"]


def test_covariates_in_any_unit_are_told_exactly(table: pd.DataFrame, tmp_path: Path) -> None:
    owner = owners(len(table), 3)
    large = table.assign(age=table["age"] * 1e12, prio=table["prio"] * 1e-9)
    plan = Plan(kind="cox", covariates=("age", "prio"), times="exact", out=str(tmp_path / "out"))
    plain, scaled = (
        np.array(analyse(plan, deal(t, owner, tmp_path / name))["cox"]["coef"])
        for name, t in (("a", table), ("b", large))
    )
    np.testing.assert_allclose(scaled * [1e12, 1e-9], plain, rtol=1e-9)


def ask_site(plan: Plan, site: Path, work: Path, step: str, arrays: Sum) -> RecordDict:
    """One message of a coordinator who follows no protocol."""
    content = wire.request({"plan_json": plan.model_dump_json(), "step": step, "levels": [], "round": 1}, arrays)
    node: list[dict[str, bool | int | float | str]] = [{"site-dir": str(site), "work-dir": str(work)}]
    grid = InProcessGrid(client_app, node, {})
    (reply,) = grid.send_and_receive([Message(content, 1000, wire.ANALYSE)])
    return reply.content


def test_three_patients_of_a_cancer_cannot_be_had_from_any_two_answers(table: pd.DataFrame, tmp_path: Path) -> None:
    """Ask for all, for each cancer type, for all but the rare one: nothing that differs by the three is ever answered."""
    rare = table.assign(cancer_type=np.where(np.arange(len(table)) % 140 == 0, "UVM", "BRCA"))
    owner = np.where(rare["cancer_type"] == "UVM", 0, owners(len(table), 2))
    assert (rare["cancer_type"] == "UVM").sum() == 4
    rare.loc[rare.index[rare["cancer_type"] == "UVM"][3], "cancer_type"] = "BRCA"
    root = deal(rare, owner, tmp_path / "sites")
    mine = rare[owner == 0]
    few = set(mine.loc[mine["cancer_type"] == "UVM", "patient"])
    assert len(few) == 3
    answered = []
    asked = [
        {},
        {"where": ("cancer_type=BRCA",)},
        {"where": ("cancer_type=UVM",)},
        {"group": "cancer_type"},
        {"group": "cancer_type=BRCA|UVM"},
        {"strata": ("cancer_type=BRCA|UVM",)},
    ]
    for extra in asked:
        plan = Plan(kind="km", min_sites=1, grid_months=4, horizon_months=52, out=str(tmp_path / "out"), **extra)
        try:
            result = analyse_at_hospitals(plan, root, tmp_path / "work")
        except (NotEnoughSites, ValueError):
            continue
        if "Site 0" in result["sites"]:
            answered.append(result)
    assert answered  # the site does answer something
    kept = tmp_path / "work" / "site-0" / "released" / "patients"
    remembered = [frozenset(f.read_text().splitlines()) for f in kept.iterdir()]
    for group in remembered:
        assert len(group) >= 11
        assert not (len(group & few) > 0 and len(group) < 14)
        for other in remembered:
            assert group == other or len(group ^ other) >= 11


def test_a_patient_who_comes_between_two_analyses_is_not_their_difference(table: pd.DataFrame, tmp_path: Path) -> None:
    owner = owners(len(table), 2)
    keep = np.ones(len(table), dtype=bool)
    keep[np.flatnonzero(owner == 0)[0]] = False
    root = deal(table[keep], owner[keep], tmp_path / "sites")
    plan = Plan(kind="km", min_sites=1, grid_months=4, horizon_months=52, out=str(tmp_path / "out"))
    assert analyse_at_hospitals(plan, root, tmp_path / "work")["sites"] == ["Site 0", "Site 1"]
    table[owner == 0].to_csv(root / "site-0" / "clinical.csv", index=False)
    again = analyse_at_hospitals(plan, root, tmp_path / "work")
    assert again["sites"] == ["Site 1"]
    assert "differ from those of an earlier table by fewer than the 11" in again["left_out"][0]["reason"]


def test_noise_replaces_the_smallest_cell_and_empties_the_budget(table: pd.DataFrame, tmp_path: Path) -> None:
    root = deal(table, owners(len(table), 2), tmp_path / "sites", 'labels = ["fin"]\nepsilon_budget = 2.5\n')
    plan = Plan(kind="km", group="fin", epsilon=1.0, grid_months=13, horizon_months=52, out=str(tmp_path / "out"))
    first = analyse_at_hospitals(plan, root, tmp_path / "work")
    again = analyse_at_hospitals(plan, root, tmp_path / "work")
    assert again["curves"] == first["curves"], "as after an answer that was lost: the very same noise"
    second = analyse_at_hospitals(plan.model_copy(update={"name": "second"}), root, tmp_path / "work")
    assert first["curves"][0]["survival"] != second["curves"][0]["survival"]
    assert max(abs(c["patients"] - (table["fin"] == v).sum()) for v, c in enumerate(first["curves"])) < 60
    with pytest.raises(NotEnoughSites, match=r"2 of the budget of 2\.5 is spent"):
        analyse_at_hospitals(plan.model_copy(update={"name": "third"}), root, tmp_path / "work")
