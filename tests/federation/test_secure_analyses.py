"""Classical analyses whose sums are added under masks: the numbers of the clear one, and no hospital's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message, RecordDict
from oncofed.client.app import app as client_app
from oncofed.client.data.site import SiteFolder, list_sites
from oncofed.common import wire
from oncofed.common.classical.risk_sets import leaving_shapes
from oncofed.common.plan import Plan
from oncofed.deploy.analyse import analyse
from oncofed.deploy.engine import InProcessGrid
from oncofed.server.classical import run_plan
from oncofed.server.roster import NotEnoughSites
from oncofed.server.secure_questions import SecureQuestions
from toy_outcomes import deal, rossi

OPEN = 'labels = ["cancer_type", "fin", "sex", "wexp"]\nmin_cell = 1\nmin_grid_months = 0\n'
STRICT = 'labels = ["cancer_type", "fin"]\n'
COX: dict[str, Any] = {"kind": "cox", "covariates": ("fin", "age", "prio"), "ties": "breslow", "horizon_months": 51.0}
STEPS = {"shares": wire.SHARES, "masked": wire.MASKED, "unmask": wire.UNMASK}
Fault = Callable[[str, str, str, int], bool]


class Hospitals:
    """Sites that mean their policies, with work folders of their own; `replies` is every message that left one."""

    def __init__(self, sites: Path, work: Path, policy: str = OPEN) -> None:
        self.folders, self.work = list_sites(sites), work
        self.names = [SiteFolder.open(f).name for f in self.folders]
        self.replies: list[Message] = []
        for folder in self.folders:
            (folder / "policy.toml").write_text(policy)

    def grid(self, fault: Fault = lambda site, kind, step, place: False) -> InProcessGrid:
        """`fault` says of site, kind, and of a question step and place, whether it fails."""
        nodes: list[Any] = [{"site-dir": str(f), "work-dir": str(self.work / f.name)} for f in self.folders]
        now: dict[str, Any] = {"step": "", "place": 0}

        def listen(message: Message) -> str | None:
            kind, ask = message.metadata.message_type, wire.read_config(message.content, "ask")
            if kind == wire.ANALYSE:
                now.update(step=ask["step"], place=ask.get("place", 0))
            name = self.names[message.metadata.dst_node_id - 1000]
            return "error" if fault(name, kind, now["step"], now["place"]) else None

        grid = InProcessGrid(client_app, nodes, {}, fault=listen)
        pull = grid.pull_messages

        def keep(ids: Any) -> Any:
            got = list(pull(ids))
            self.replies += got
            return got

        grid.pull_messages = keep  # type: ignore[method-assign]
        return grid

    def run(self, plan: Plan, fault: Fault = lambda site, kind, step, place: False) -> dict[str, Any]:
        return run_plan(plan, self.grid(fault))

    def one(self, name: str, content: RecordDict, kind: str = wire.ANALYSE) -> wire.Config:
        """What one of them says to a message of a coordinator who follows no protocol."""
        (reply,) = self.grid().send_and_receive([Message(content, 1000 + self.names.index(name), kind)])
        return wire.read_config(reply.content, "from")


def plan_of(out: Path, secure: bool = True, **keys: Any) -> Plan:
    return Plan(**({"secure_sum": secure, "wait_sites_s": 2.0, "timeout_s": 2.0, "out": str(out)} | keys))


def found(result: dict[str, Any]) -> dict[str, Any]:
    """All that an analysis has found."""
    beside = ("plan", "notes", "seconds", "bytes_to_sites", "bytes_from_sites", "left_out", "questions")
    return {k: v for k, v in result.items() if k not in beside}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return rossi()


def hospitals_of(table: pd.DataFrame, sites: int, root: Path, policy: str = OPEN) -> Hospitals:
    owner = np.random.default_rng(sites).integers(0, sites, len(table))
    return Hospitals(deal(table, owner, root / "sites"), root / "work", policy)


# -- the same numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "cox", "covariates": ("age", "sex=female|male"), "ties": "breslow", "robust": True},
        {"kind": "cox", "covariates": ("age",), "strata": ("cancer_type",), "ridge": 0.1},
        {"kind": "km", "group": "cancer_type"},
        {"kind": "logrank", "group": "sex=female|male", "strata": ("cancer_type",), "rho": 1.0},
    ],
    ids=lambda keys: f"{keys['kind']}, {len(keys)} keys",
)
def test_what_is_found_is_that_of_clear_sums_to_the_last_bit(
    consortium: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    shutil.copytree(consortium, tmp_path / "sites", ignore=shutil.ignore_patterns(".oncofed"))
    told = []
    for secure in (False, True):
        hospitals = Hospitals(tmp_path / "sites", tmp_path / f"work-{secure}")
        told.append(hospitals.run(plan_of(tmp_path / "out", secure, **keys)))
    assert told[1]["left_out"] == []
    assert found(told[0]) == found(told[1])
    assert "under masks" in " ".join(told[1]["notes"])


@pytest.mark.parametrize("keys", [COX, {"kind": "km", "group": "fin", "grid_months": 2, "horizon_months": 48}])
def test_so_it_is_behind_policies(table: pd.DataFrame, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Smallest cells, runs of intervals and questions are those of the clear analysis: the door comes before the masks."""
    told = []
    for secure in (False, True):
        hospitals = hospitals_of(table, 4, tmp_path / str(secure), STRICT)
        told.append(hospitals.run(plan_of(tmp_path / "out", secure, **keys)))
    assert found(told[0]) == found(told[1])
    assert sum("intervals of time together" in note for note in told[1]["notes"]) == 1


def test_covariates_in_any_unit_are_summed_exactly(table: pd.DataFrame, tmp_path: Path) -> None:
    large = table.assign(age=table["age"] * 1e120, prio=table["prio"] * 1e130)
    told = [hospitals_of(large, 5, tmp_path / str(s)).run(plan_of(tmp_path / "out", s, **COX)) for s in (False, True)]
    assert found(told[0]) == found(told[1])


def test_a_fit_is_evaluated_by_totals(table: pd.DataFrame, tmp_path: Path) -> None:
    keys = {"kind": "cox", "covariates": ("fin", "age"), "test": ("wexp=1",)}
    clear, secure = (
        hospitals_of(table, 4, tmp_path / str(s)).run(plan_of(tmp_path / "out", s, **keys)) for s in (False, True)
    )
    assert secure["evaluation"].pop("by_site") == {}
    assert len(clear["evaluation"].pop("by_site")) == 4
    assert found(clear) == found(secure)
    strict = hospitals_of(table, 4, tmp_path / "strict", STRICT.replace('"fin"', '"fin", "wexp"'))
    keys |= {"ties": "breslow", "covariates": ("age",), "horizon_months": 51.0}
    told = strict.run(plan_of(tmp_path / "out", **keys))["evaluation"]
    assert set(told) == {
        "c_index_within_sites",
        "by_site",
    }  # a table of single patients leaves no hospital with a smallest cell


@pytest.mark.parametrize("sites", [3, 5, 20])
@pytest.mark.parametrize("step", ["question", "shares", "masked", "unmask"])
def test_whoever_drops_out_the_result_is_that_of_the_others(
    table: pd.DataFrame, tmp_path: Path, sites: int, step: str
) -> None:
    """None, and all that may be lost, at each exchange; one more ends the analysis, and nothing is known."""
    spare = sites - 3 if step == "question" else sites - (2 * sites // 3 + 1)
    hospitals = hospitals_of(table, sites, tmp_path)
    plan = plan_of(tmp_path / "out", kind="km", group="fin", grid_months=2.0, horizon_months=48.0, min_sites=3)

    def losing(gone: list[str], kind: str, of: str = "table") -> Fault:
        return lambda site, asked, step, place: site in gone and asked == kind and step == of

    for lost in sorted({0, spare}):
        gone, kind = hospitals.names[1 : 1 + lost], STEPS.get(step, wire.ANALYSE)
        hospitals.work = tmp_path / f"work-{lost}"
        secure = hospitals.run(plan, losing(gone, kind))
        hospitals.work = tmp_path / f"clear-{lost}"
        absent = [] if step == "unmask" else gone  # who is lost at the end is in the total
        clear = hospitals.run(plan.model_copy(update={"secure_sum": False}), losing(absent, wire.ANALYSE))
        assert found(secure) == found(clear)
        assert secure["sites"] == sorted(set(hospitals.names) - set(absent))
    hospitals.work = tmp_path / "work-few"
    with pytest.raises(NotEnoughSites, match=r"good answers to .* of a secure sum, wanted .*nothing is known of any"):
        hospitals.run(plan, losing(hospitals.names[: spare + 1], STEPS.get(step, wire.ANALYSE)))


# -- nothing else ----------------------------------------------------------------------------------------------------------


def test_no_reply_holds_a_hospitals_own_sum(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals = hospitals_of(table, 4, tmp_path)
    result = hospitals.run(plan_of(tmp_path / "out", **COX, robust=True, test=("wexp=1",)))
    kinds = [reply.metadata.message_type for reply in hospitals.replies]
    sums = kinds.count(wire.MASKED)
    assert sums == kinds.count(wire.SHARES) == kinds.count(wire.UNMASK) == kinds.count(wire.ANALYSE) - 4
    assert sums == 4 * result["questions"]
    for reply in hospitals.replies:
        assert ("arrays" in reply.content.array_records) == (reply.metadata.message_type == wire.MASKED)
        told = wire.read_config(reply.content, "from")
        assert not {"patients", "events"} & set(told)
        if reply.metadata.message_type == wire.MASKED:
            assert all(v.dtype == np.uint64 for v in wire.read_arrays(reply.content).values())


def test_a_hospital_may_answer_analyses_under_masks_alone(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals = hospitals_of(table, 4, tmp_path, OPEN + "require_secure_sum = true\nmin_members = 4\n")
    keys = {"kind": "km", "horizon_months": 51.0}
    with pytest.raises(NotEnoughSites, match=r"its policy does not \(require_secure_sum\); set secure_sum = true"):
        hospitals.run(plan_of(tmp_path / "out", False, **keys))
    with pytest.raises(NotEnoughSites, match="3 members of a secure sum, wanted 4"):
        hospitals.run(
            plan_of(tmp_path / "out", **keys), lambda site, kind, step, _: site == "Site 3" and step == "table"
        )
    assert hospitals.run(plan_of(tmp_path / "out", **keys))["sites"] == hospitals.names


def test_two_hospitals_have_no_total(table: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSites, match=r"2 good answers to 'query\.analyse' of a secure sum, wanted 3"):
        hospitals_of(table, 2, tmp_path).run(plan_of(tmp_path / "out", kind="km"))


def test_the_memory_of_tables_holds_under_masks(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals = hospitals_of(table, 3, tmp_path, STRICT)
    hospitals.run(plan_of(tmp_path / "out", kind="km", horizon_months=30))
    with pytest.raises(NotEnoughSites, match="patients with the event who differ from those of an earlier table"):
        hospitals.run(plan_of(tmp_path / "out", kind="km", horizon_months=33))


def test_noise_is_paid_for_under_masks(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals = hospitals_of(table, 3, tmp_path, STRICT + "epsilon_budget = 1.5\n")
    keys = {"kind": "km", "epsilon": 1.0, "grid_months": 13.0, "horizon_months": 52.0}
    result = hospitals.run(plan_of(tmp_path / "out", **keys))
    assert abs(result["curves"][0]["patients"] - len(table)) < 60
    again = hospitals.run(plan_of(tmp_path / "again", **keys))  # as after an answer that was lost: the very same noise
    assert again["curves"] == result["curves"]
    with pytest.raises(NotEnoughSites, match=r"1 of the budget of 1\.5 is spent"):
        hospitals.run(plan_of(tmp_path / "out", name="second", **keys))


# -- the same hospitals ----------------------------------------------------------------------------------------------------


def test_a_hospital_that_is_away_for_a_moment_is_asked_once_more(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals, failed = hospitals_of(table, 4, tmp_path), []

    def once(site: str, kind: str, step: str, place: int) -> bool:
        if (site, kind, step, place) == ("Site 2", wire.MASKED, "cox", 2) and not failed:
            failed.append(site)
            return True
        return False

    secure = hospitals.run(plan_of(tmp_path / "out", **COX), once)
    assert failed
    assert [x["site"] for x in secure["left_out"]] == ["Site 2"]
    hospitals.work = tmp_path / "clear"
    assert found(hospitals.run(plan_of(tmp_path / "out", False, **COX))) == found(secure)


def test_an_analysis_does_not_go_on_without_a_hospital_and_goes_on_with_it(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals, plan = hospitals_of(table, 4, tmp_path), plan_of(tmp_path / "out", **COX)

    def away(site: str, kind: str, step: str, place: int) -> bool:
        return site == "Site 2" and step == "cox" and place > 1

    with pytest.raises(NotEnoughSites, match=r"not all 4 hospitals .* Site 2: .*Run the same plan when they are back"):
        hospitals.run(plan, away)
    # a coordinator who begins anew without it has the same places, whose totals are of all four
    with pytest.raises(NotEnoughSites, match="for the total of Site 0, Site 1, Site 2, Site 3; another total"):
        hospitals.run(plan, lambda site, kind, step, place: site == "Site 2" and step != "greeting")
    whole = hospitals.run(plan)
    hospitals.work = tmp_path / "clear"
    assert found(hospitals.run(plan.model_copy(update={"secure_sum": False}))) == found(whole)


def test_a_step_without_a_hospital_is_no_other_analysis(table: pd.DataFrame, tmp_path: Path) -> None:
    """A server that goes on by its own rules: the sites hold the total of a later step against the first one's members."""
    hospitals, plan = hospitals_of(table, 4, tmp_path), plan_of(tmp_path / "out", **COX)
    once = SecureQuestions._once

    def careless(self: SecureQuestions, step: str, *rest: Any) -> Any:
        *rest, members = rest
        return once(self, step, *rest, members - {"Site 2"} if self.places[step] == 2 and step == "cox" else members)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureQuestions, "_once", careless)
        with pytest.raises(NotEnoughSites, match="the totals of this analysis are of Site 0, Site 1, Site 2, Site 3"):
            hospitals.run(plan)


def test_a_place_has_one_question(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals, plan = hospitals_of(table, 3, tmp_path), plan_of(tmp_path / "out", **COX)
    hospitals.run(plan)

    def asked(place: int, beta: float, step: str = "cox") -> str:
        ask: wire.Config = {"plan_json": plan.model_dump_json(exclude={"out"}), "step": step, "levels": [], "round": 9}
        arrays = {"mean": np.array([0.5, 24.0, 3.0]), "sd": np.array([0.5, 6.0, 3.0]), "beta": np.full(3, beta)}
        return str(hospitals.one("Site 1", wire.request(ask | {"place": place, "sites": 3}, arrays)).get("refusal"))

    assert "this place in the study had another question, and its total is known" in asked(1, 0.5)
    assert "question 11 of 'cox', the plan has 10; each has one total" in asked(11, 0.0)
    assert "question 0 of 'cox'" in asked(0, 0.0)
    assert "question 3 of 'moments', the plan has 2" in asked(3, 0.0, "moments")
    assert asked(10, 0.0) == "None"


def test_coefficients_too_far_out_are_said_in_the_sum_alone(table: pd.DataFrame, tmp_path: Path) -> None:
    """As in clear a shorter step is tried; no hospital says that it was the one."""
    hospitals, plan = hospitals_of(table, 3, tmp_path), plan_of(tmp_path / "out", **COX)
    questions: list[SecureQuestions] = []
    fix = SecureQuestions.fix

    def keep(self: SecureQuestions, sites: set[str], step: str) -> None:
        questions.append(self)
        fix(self, sites, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureQuestions, "fix", keep)
        hospitals.run(plan)
    sent = {"mean": np.array([0.5, 24.0, 3.0]), "sd": np.array([0.5, 6.0, 3.0]), "beta": np.array([0.0, 0.0, 20.0])}
    total = questions[-1].add_up("cox", sent, leaving_shapes(3, 1, 18, "breslow"))
    assert total["beyond"][0] > 0
    assert total["left/0"].max() < 4e12
    assert questions[-1].roster.left_out == []


# -- what needs one hospital's own -----------------------------------------------------------------------------------------

KM: dict[str, Any] = {"kind": "km"}


@pytest.mark.parametrize(
    ("keys", "says", "remedy"),
    [
        ({"times": "exact"}, "names? its event times.*times = 'grid'", {"times": "grid"}),
        ({"group": "site"}, "'site' sets hospitals apart.*leave it out", {"group": ""}),
        ({"strata": ("site",)}, "'site' sets hospitals apart.*leave it out", {"strata": ()}),
        ({"where": ("site=A|B|C",)}, r"'site=A\|B\|C' sets hospitals apart.*leave it out", {"where": ()}),
        ({**COX, "test": ("site=A",)}, "'site=A' sets hospitals apart.*leave it out", {"test": ()}),
        ({"secure_threshold": 2}, "set it to 3 or more, or to 0", {"secure_threshold": 3}),
        ({"secure_sum": False, "secure_threshold": 4}, "set secure_sum = true", {"secure_sum": True}),
    ],
)
def test_what_needs_one_hospitals_own_numbers_is_refused_and_the_remedy_helps(
    keys: dict[str, Any], says: str, remedy: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=says):
        Plan(**(KM | {"secure_sum": True} | keys))
    Plan(**(KM | {"secure_sum": True} | keys | remedy))


def test_a_site_refuses_such_a_plan_whatever_the_server_lets_through(table: pd.DataFrame, tmp_path: Path) -> None:
    hospitals = hospitals_of(table, 3, tmp_path)
    text = Plan(kind="km", secure_sum=True).model_dump_json().replace('"where":[]', '"where":["site=Site 1"]')
    told = hospitals.one("Site 1", wire.request({"plan_json": text, "step": "table", "place": 1, "levels": []}, {}))
    assert "sets hospitals apart" in str(told["refusal"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "superlink"])
def test_engines_give_the_same_result(table: pd.DataFrame, tmp_path: Path, engine: Any) -> None:
    """Real processes, one for each message of a site."""
    root = deal(table, np.random.default_rng(0).integers(0, 4, len(table)), tmp_path / "sites", OPEN)
    clear = analyse(plan_of(tmp_path / "clear", False, **COX), root)
    keys = {"wait_sites_s": 120.0, "timeout_s": 120.0}
    secure = analyse(plan_of(tmp_path / "secure", **COX, **keys), root, engine)
    assert found(clear) == found(secure)
