"""Scripts, style sheets and templates of the interactive exhibits, from ``assets``."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup


def asset(name: str) -> Markup:
    """Text of a script or style sheet, to stand in a page as it is."""
    return Markup(files(__package__).joinpath("assets", name).read_text(encoding="utf8"))


def render(template: str, **values: Any) -> str:
    """A template filled in; values are escaped, whatever characters a gene's name has."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["asset"] = asset
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment
