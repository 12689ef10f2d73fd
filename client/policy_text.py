"""policy.toml as text: a template with every key, its default and its meaning."""

from __future__ import annotations

import textwrap
from typing import Any

import tomli_w
from oncofed.client.policy import Policy

HEAD = """\
# What this hospital allows, whatever a study asks. The file belongs to the hospital: no message can change it.
# Take the # before a key away to set it; what stands there is the default. `oncofed site policy` checks the file.
"""


def template() -> str:
    """Every key commented out, with its meaning above it."""
    parts = [HEAD]
    for key, about in Policy.model_fields.items():
        meaning = textwrap.fill(str(about.description), 118, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{meaning}\n# {key} = {toml_value(about.default)}\n")
    return "\n".join(parts)


def toml_value(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
