"""The house keeps its shape: dependency arrows, package list, Flower's config."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from oncofed.common.plan import Plan
from oncofed.common.study import Study

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "common": {"common"},
    "client": {"common", "client"},
    "server": {"common", "server"},
    "deploy": {"common", "client", "server", "deploy"},
}


def imported_parts(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {
                f"{node.module}.{alias.name}" if node.module == "oncofed" else str(node.module) for alias in node.names
            }
    return {n.split(".")[1] for n in names if n.startswith("oncofed.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_arrows_point_one_way(part: str) -> None:
    files = list((ROOT / part).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): imported_parts(f) - ALLOWED[part] for f in files}
    assert not {f: w for f, w in wrong.items() if w}


def test_only_the_engine_touches_private_flower() -> None:
    private = (
        "flwr.supercore",
        "flwr.server.superlink",
        "flwr.simulation.run_simulation",
        "flwr.proto",
        "flwr.common.constant",
    )
    users = {
        str(f.relative_to(ROOT))
        for part in ALLOWED
        for f in (ROOT / part).rglob("*.py")
        if any(p in f.read_text() for p in private)
    }
    assert users == {"deploy/engine.py"}


def test_a_node_imports_what_every_message_needs_alone() -> None:
    """At its start, and for each message that is not forked; these take longer to import than a small round to compute."""
    slow = ["torchsurv", "opacus", "captum", "matplotlib", "scipy.stats", "sklearn", "pandera", "anndata"]
    told = f"import sys, oncofed.client.app; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_list_matches_the_tree() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "oncofed." + ".".join(f.parent.relative_to(ROOT).parts)
        for part in ALLOWED
        for f in (ROOT / part).rglob("__init__.py")
    }
    assert listed == found


def test_flower_config_is_the_default_study() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat: dict[str, object] = {}

    def walk(table: dict[str, object], prefix: str) -> None:
        for key, value in table.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else flat.__setitem__(prefix + key, value)

    walk(config, "")
    assert flat == Study().run_config() | {"study": "", "plan": "", "sites": ""}


def test_the_guide_lists_every_key_of_a_study() -> None:
    guide = (ROOT / "docs" / "study.md").read_text()
    for key, value in Study().run_config().items():
        check_row(guide, key, value)


def test_the_guide_lists_every_key_of_a_plan() -> None:
    """With the words of its description, which are those of the code."""
    guide = (ROOT / "docs" / "analyse.md").read_text()
    rows = guide.split("## Keys")[1].splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == list(Plan.model_fields)
    for key, about in Plan.model_fields.items():
        value = ",".join(map(str, about.default)) if isinstance(about.default, tuple) else about.default
        row = check_row(guide, key, value)
        assert row.endswith(f"| {str(about.description).replace('|', chr(92) + '|')} |"), (key, row)


def check_row(guide: str, key: str, value: object) -> str:
    """A key's row of a guide's table, with its default; `()` is an empty list."""
    assert f"| `{key}` |" in guide, key
    row = guide.split(f"| `{key}` |")[1].splitlines()[0]
    assert f"| `{value}` |" in row or (row.startswith(" list | `()` |") and value == ""), (key, value, row)
    assert row.replace("\\|", "").count("|") == 3, f"{key}: a bar in a cell of the table must be escaped"
    return row


def test_top_level_holds_what_the_architecture_names() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line}
    assert folders <= {"server", "client", "common", "deploy", "tests", "docs", ".ci"}


def test_files_stay_readable() -> None:
    lengths = {
        str(f.relative_to(ROOT)): len(f.read_text().splitlines())
        for part in ALLOWED
        for f in (ROOT / part).rglob("*.py")
    }
    assert not {f: n for f, n in lengths.items() if n > 400}
