"""Run a classical analysis over a folder of sites on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oncofed.client.data.site import list_sites
from oncofed.common.plan import Plan
from oncofed.deploy.simulate import Engine, check_names, run_on
from oncofed.server.classical import RESULT


def analyse(plan: Plan, sites: Path, engine: Engine = "local") -> dict[str, Any]:
    """The result of `plan` over the site folders below `sites`; it and its report lie below `plan.out`."""
    folders = list_sites(sites)
    check_names(folders)
    out = Path(plan.out).resolve()
    whole = plan.model_copy(update={"out": str(out)})
    run_on(engine, {"plan": whole.model_dump_json()}, sites, folders, out / "processes")
    return dict(json.loads((out / RESULT).read_text()))
