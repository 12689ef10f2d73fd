"""From a template of this folder, numbers and pictures to one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2


def page(template: str, pictures: Mapping[str, str], **values: Any) -> str:
    """The page; text is escaped, pictures are not: they are our own SVG, no input. A name that is missing is an error."""
    loader = jinja2.FunctionLoader(lambda name: (files("oncofed.server.report") / name).read_text())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    ours = {name: jinja2.utils.markupsafe.Markup(svg) for name, svg in pictures.items()}
    return environment.get_template(template).render(pictures=ours, **values)
