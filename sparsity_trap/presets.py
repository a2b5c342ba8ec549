"""Presets as they stand in files: read, checked, and taken to their worlds."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import yaml
from pydantic import ValidationError

from sparsity_trap.inputs import read_text
from sparsity_trap.settings import NAME, REPEAT, ROOT, Preset, UserError

PRESETS = ROOT / "presets"

#: Arms that every preset may run.
ARMS = PRESETS / "arms.yaml"


def load_preset(name: str, source: str = "") -> Preset:
    """Read and check ``presets/<name>.yaml``.

    Parameters
    ----------
    name
        Name of a file in ``presets/`` without its ending; ``laptop/shifted`` is the world
        ``shifted`` of the preset ``laptop``.
    source
        Replaces the file's ``source`` when given, and is then added to the preset's name, so that
        results of different sources never share a folder.

    Raises
    ------
    UserError
        The file is missing, is not YAML, or has an unknown or invalid key; there is no such world.
    """
    name, _, world = name.partition("/")
    path = PRESETS / f"{name}.yaml"
    if not re.fullmatch(NAME, name) or not path.is_file() or path == ARMS:
        named = [p.stem for p in PRESETS.glob("*.yaml") if p != ARMS]
        if name in named:
            raise UserError(
                f"preset '{name}' cannot name a folder ({path}): rename its file with letters, "
                "digits, _ . + -"
            )
        known = ", ".join(sorted(named))
        raise UserError(f"preset '{name}' does not exist ({path}): choose one of {known}")
    content = read_yaml(path)
    content = {"name": name, **content}
    if isinstance(content.get("arms", {}), dict):
        content["arms"] = read_yaml(ARMS) | content.get("arms", {})
    if source and source != content.get("source", "simulated"):
        content |= {"name": f"{name}-{source}", "source": source}
    try:
        preset = Preset.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    if preset.source != "spaceranger" and preset.encoder.rehearsal:
        encoder = preset.encoder.model_copy(update={"name": preset.encoder.rehearsal})
        preset = preset.model_copy(update={"encoder": encoder})
    for other in () if preset.source == "spaceranger" else preset.worlds:
        try:
            in_world(preset, other)
        except ValidationError as error:
            raise UserError(f"{path}: worlds.{other}: {first_problem(error)}") from None
    return in_world(preset, world) if world else preset


def in_world(preset: Preset, name: str) -> Preset:
    """A preset with the sections and runs of one of its worlds, or repeated.

    A *repeat* has the preset's sections, and its runs that carry claims (all, where none is marked
    so), with seeds from another number on (``seeds1000``), or trained with another number of
    threads (``threads2``) or on another processor (``gpu``), for which who starts it cares.

    Raises
    ------
    UserError
        There is no such world, or sections are real.
    """
    called = {"name": f"{preset.name}/{name}", "worlds": {}}
    if repeat := REPEAT.fullmatch(name):
        first = int(repeat[2]) if repeat[1] == "seeds" else 0
        own = [r for r in preset.runs if r.claims] or preset.runs
        runs = [r.model_copy(update={"seeds": [first + s for s in r.seeds]}) for r in own]
        return preset.model_copy(update=called | {"runs": runs})
    if preset.source == "spaceranger":
        raise UserError(
            f"preset '{preset.name}' has real sections, world '{name}' is a simulated one: "
            "choose SOURCE=simulated or tissue-map, or leave the world out"
        )
    if name not in preset.worlds:
        raise UserError(
            f"world '{name}' does not exist in preset '{preset.name}': choose one of "
            f"{', '.join(preset.worlds) or 'none, or add it under worlds'}"
        )
    world = preset.worlds[name]
    changed = {"simulation": preset.simulation.model_dump() | world.simulation, "runs": world.runs}
    elsewhere = Preset.model_validate(preset.model_dump() | called | changed)
    elsewhere._home = preset
    return elsewhere


def other_worlds(preset: Preset) -> dict[str, Preset]:
    """Every world of a preset but its own, by name; none where sections are real."""
    real = preset.source == "spaceranger"
    return {} if real else {name: in_world(preset, name) for name in preset.worlds}


def read_yaml(path: Path) -> dict:
    """Read a YAML file that holds a mapping.

    Raises
    ------
    UserError
        The file cannot be read, is not YAML of a mapping, or gives a key twice.
    """
    text = read_text(path, "YAML in UTF-8")
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    # PyYAML's own conversions raise ValueErrors on dates and numbers that cannot be.
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path} is not valid YAML ({said}{where}): mend it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping: write lines of the form 'key: value'")
    return content


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice, of which YAML readers keep the last silently.

    It refuses one, too, that YAML takes for a number, a truth value or a date: what was typed as a
    name would arrive as another.
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            kind = key.tag.rpartition(":")[2]
            if kind not in ("str", "merge"):
                problem = (
                    f"YAML reads the name {key.value} as {kind}; put quotes around a number or "
                    "word that is a name"
                )
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in [earlier.value for earlier in keys[:i]]:
                problem = f"'{key.value}' is given twice; rename or remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return node


def first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'; remove it or correct its spelling"
    if problem["type"] == "missing":
        return f"key '{key}' is missing; add it"
    typed, value = problem["type"] in ("string_type", "path_type"), problem["input"]
    if typed and isinstance(value, (bool, int, float, date)):
        return f"key '{key}': YAML reads {value} as {type(value).__name__}; put quotes around it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"key '{key}': {message}" if key else message
