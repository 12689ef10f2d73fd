"""The bundle that Flower ships to sites: configuration only, no code."""

from __future__ import annotations

from pathlib import Path

import tomli_w


def write_bundle(folder: Path, config: dict[str, bool | int | float | str]) -> Path:
    """A Flower app folder whose run config is `config`; its components are those of the installed package."""
    folder.mkdir(parents=True, exist_ok=True)
    app = {
        "publisher": "oncofed",
        "fab-include": ["README.md"],
        "components": {"serverapp": "oncofed.server.app:app", "clientapp": "oncofed.client.app:app"},
        "config": {"study": "", "plan": "", "sites": ""} | config,
    }
    project = {
        "name": "oncofed-study",
        "version": "1.0.0",
        "description": "An oncofed study: configuration only",
        "license": "Apache-2.0",
        "dependencies": [],
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))
    (folder / "README.md").write_text(
        "An oncofed study. It holds configuration only; every party runs the oncofed that it installed.\n"
    )
    return folder
