"""The matrix of every model at every hospital: sums over folds by hand, what is unknown, and what the report draws of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oncofed.server.cross_site import matrix
from oncofed.server.report.cross_site import every_model, sites_apart
from oncofed.server.report.render import render
from toy_studies import copy_sites, train

TITLE, APART = "<h2>Every model at every hospital</h2>", "<h2>Hospitals that took no part</h2>"


def fold(
    concordant: list[list[float | None]],
    comparable: list[list[float | None]],
    sites: tuple[str, ...] = ("A", "B"),
    trained: tuple[str, ...] = ("A", "B"),
    gaps: tuple[dict[str, Any], ...] = (),
) -> dict[str, Any]:
    models = [{"kind": "federated", "site": None}, *({"kind": "local", "site": s} for s in sites)]
    sums = {"concordant": concordant, "comparable": comparable, "patients": comparable, "loss": comparable}
    part = {"sites": list(sites), "models": models, "sums": sums, "gaps": list(gaps)}
    return {"fold": 0, "site_evidence": dict.fromkeys(trained), "cross_site": part}


def test_pairs_of_folds_are_pooled_cell_by_cell() -> None:
    table = matrix(
        [
            fold([[10, 30], [12, 20], [5, 36]], [[20, 40], [20, 40], [20, 40]]),
            fold([[30, 10], [18, 10], [20, 12]], [[40, 20], [40, 20], [40, 20]]),
            {"fold": 2, "site_evidence": {}},  # of an earlier version
        ]
    )
    assert table is not None
    expected = np.array([[40, 40], [30, 30], [25, 48]]) / 60
    np.testing.assert_allclose(np.array(table["score"]), expected)
    assert table["pairs"] == [[60, 60]] * 3
    federated, a, b = table["models"]
    assert (federated["own"], federated["others"], federated["all"]) == (pytest.approx(80 / 120), None, 80 / 120)
    assert (a["own"], a["others"], a["all"]) == (0.5, 0.5, 0.5)
    assert (b["own"], b["others"], b["all"]) == pytest.approx((48 / 60, 25 / 60, 73 / 120))
    local = table["kinds"]["local"]
    assert (local["own"], local["others"], local["all"]) == pytest.approx((78 / 120, 55 / 120, 133 / 240))
    assert local["better"] == (1, 2)  # federated: 40/60 against 30/60 at A, 40/60 against 48/60 at B
    assert table["kinds"]["federated"]["better"] is None


def test_kinds_are_compared_at_the_hospitals_that_all_of_them_have() -> None:
    """B's own model is missing: the federated one is then held against A's at A alone."""
    gap = {"model": 2, "site": None, "reason": "refused"}
    table = matrix([fold([[15, 1], [10, 9], [None, None]], [[20, 20], [20, 20], [None, None]], gaps=(gap,))])
    assert table is not None
    assert table["score"][2] == [None, None]
    assert table["own_sites"] == 1
    assert table["kinds"]["federated"]["own"] == 0.75
    assert table["models"][0]["own"] == 16 / 40
    assert table["kinds"]["local"]["better"] == (1, 1)
    assert table["gaps"] == [gap | {"model": {"kind": "local", "site": "B"}, "fold": 0}]


def test_hospitals_come_and_go_between_folds() -> None:
    one = fold([[15], [10]], [[20], [20]], sites=("A",), trained=("A",))
    two = fold([[9, 8], [7, 6], [5, 4]], [[10, 10]] * 3, sites=("B", "C"), trained=("B",))
    table = matrix([one, two])
    assert table is not None
    assert table["sites"] == ["A", "B", "C"]
    assert [m["site"] for m in table["models"]] == [None, "A", "B", "C"]
    assert table["score"] == [[0.75, 0.9, 0.8], [0.5, None, None], [None, 0.7, 0.6], [None, 0.5, 0.4]]
    # C trained nothing, so that the federated model is a stranger's there
    assert table["models"][0]["others"] == 0.8


def test_no_fold_no_matrix() -> None:
    assert matrix([{"fold": 0, "evaluation": {}}]) is None


def test_few_pairs_are_grey_and_numbers_are_written_while_there_is_room() -> None:
    def drawn(sites: int) -> str:
        names = [f"H{i}" for i in range(sites)]
        models = [{"kind": "federated", "site": None}, *({"kind": "local", "site": s} for s in names)]
        score = [[0.61] * sites] * (sites + 1)
        pairs = [[9.0] + [10.0] * (sites - 1)] * (sites + 1)
        return every_model({"sites": names, "models": models, "score": score, "pairs": pairs, "measure": "c_index"})

    small, large = drawn(3), drawn(16)
    assert len(re.findall(r">\.61<", small)) == 2 * 4
    assert ">.61<" not in large
    assert ">H0 (9)<" in small
    assert ">H15 (10)<" in large
    assert drawn(3) == small


def test_a_matrix_that_knows_nothing_is_drawn() -> None:
    models = [{"kind": "federated", "site": None}]
    for measure in ("c_index", "accuracy"):
        table = {"sites": ["A"], "models": models, "score": [[None]], "pairs": [[0.0]], "measure": measure}
        assert every_model(table).startswith("<svg")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, consortium: Path) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("report")
    copy_sites(root, consortium)
    keys = {"training__evaluate_every": 0, "training__rounds": 2, "analysis__personal_rounds": 1}
    return train(root, **keys, analysis__cross_site=["local", "personalised"]).results


def test_the_report_shows_it_where_it_is(results: dict[str, Any]) -> None:
    html = render({"results": results})
    table = matrix(results["folds"])
    assert table is not None
    assert TITLE in html
    assert APART not in html
    assert "after 1 more round at one hospital" in html
    for kind in ("local", "personalised"):
        own, of = (table["kinds"][kind][key] for key in ("own", "better"))
        assert f"<td>{kind}</td><td>{own:.3f}</td>" in html
        assert f"{of[0]} of {of[1]} hospitals" in html
    assert "gap" not in re.sub(r"(?s)<style>.*?</style>", "", html).partition(TITLE)[2].partition("<h2>")[0]
    for f in results["folds"]:
        del f["cross_site"]
    assert TITLE not in render({"results": results})


def test_hospitals_that_were_held_out_have_a_score_each() -> None:
    survival = {"patients": [6, 4], "loss": [3.0, 2.0], "events": [1, 1], "concordant": [6, 3], "comparable": [8, 4]}
    study = {"splits": {"held_out_sites": ["A", "B"]}}
    folds = [{"fold": 1, "evaluation": survival}, {"fold": 0}]
    assert sites_apart(study, folds) == [{"site": "B", "patients": 10, "pairs": 12, "score": 0.75, "loss": 0.5}]
    nobody = {key: [0.0, 0.0] for key in survival}
    assert sites_apart(study, [{"fold": 0, "evaluation": nobody}])[0]["score"] is None
    classes = {"patients": [6, 4], "loss": [3.0, 2.0], "confusion": [[5, 1], [2, 2]]}
    assert sites_apart(study, [{"fold": 0, "evaluation": classes}])[0] | {"loss": 0} == {
        "site": "A",
        "patients": 10,
        "pairs": None,
        "score": 0.7,
        "loss": 0,
    }
    assert sites_apart({"splits": {"held_out_sites": []}}, folds) == []
