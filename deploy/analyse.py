"""Run a classical analysis over a folder of sites on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oncofed.client.app import app as client_app
from oncofed.client.data.site import list_sites
from oncofed.common.plan import Plan
from oncofed.deploy.engine import run_in_process, run_on_ray
from oncofed.deploy.loopback import run_on_superlink
from oncofed.deploy.simulate import Engine, check_names
from oncofed.server.app import app as server_app
from oncofed.server.classical import RESULT


def analyse(plan: Plan, sites: Path, engine: Engine = "local") -> dict[str, Any]:
    """The result of `plan` over the site folders below `sites`; it and its report lie below `plan.out`."""
    folders = list_sites(sites)
    check_names(folders)
    out = Path(plan.out).resolve()
    config: dict[str, bool | int | float | str] = {
        "plan": plan.model_copy(update={"out": str(out)}).model_dump_json(),
        "sites": str(sites.resolve()),
    }
    if engine == "ray":
        run_on_ray("oncofed.server.app:app", "oncofed.client.app:app", len(folders), config)
    elif engine == "superlink":
        run_on_superlink({"plan": config["plan"]}, folders, out / "processes")
    else:
        nodes: list[dict[str, bool | int | float | str]] = [
            {"partition-id": i, "num-partitions": len(folders)} for i in range(len(folders))
        ]
        run_in_process(server_app, client_app, nodes, config)
    return dict(json.loads((out / RESULT).read_text()))
