"""codemeta.json, .zenodo.json and paper.md, from CITATION.cff, the one place that is edited:

python workflow/citation.py
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sparsity_trap.files import building
from sparsity_trap.settings import ROOT, UserError

SOURCE = ROOT / "CITATION.cff"
ORCID = "https://orcid.org/"

#: What the other files are made of.
NEEDED = ("title", "abstract", "version", "license", "authors", "keywords")


def read(path: Path = SOURCE) -> dict[str, Any]:
    """Read a citation file.

    Raises
    ------
    UserError
        It is no citation file, or lacks what the other files need; an author without a name.
    """
    try:
        cited = yaml.safe_load(path.read_text(encoding="utf8"))
        missing = [key for key in NEEDED if not cited.get(key)]
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path.name} is not in the Citation File Format: mend it") from error
    if missing:
        raise UserError(f"{path.name} lacks {', '.join(missing)}: add it there")
    for author in cited["authors"]:
        if not isinstance(author, dict) or not ({"name", "family-names"} & set(author)):
            raise UserError(
                f"{path.name}: the author {author} has no name: give family-names and given-names, "
                "or name where it is a group"
            )
    return cited


def full_name(author: dict[str, str]) -> str:
    """Name of a person or a group, as it is read.

    >>> full_name({"family-names": "Beethoven", "given-names": "Ludwig", "name-particle": "van"})
    'Ludwig van Beethoven'
    """
    parts = ("given-names", "name-particle", "family-names", "name-suffix")
    return author.get("name") or " ".join(author[part] for part in parts if part in author)


def person(author: dict[str, str]) -> dict[str, Any]:
    """A person or a group in the terms of schema.org; ``@id`` is the ORCID, where there is one."""
    same = {"@id": author["orcid"]} if "orcid" in author else {}
    if "family-names" not in author:
        return same | {"@type": "Organization", "name": author["name"]}
    family = [author[part] for part in ("name-particle", "family-names") if part in author]
    found = {"@type": "Person", "name": full_name(author), "familyName": " ".join(family)}
    if "given-names" in author:
        found["givenName"] = author["given-names"]
    if "affiliation" in author:
        found["affiliation"] = {"@type": "Organization", "name": author["affiliation"]}
    return same | found


def codemeta(cited: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the software, for https://codemeta.github.io."""
    repository = cited.get("repository-code")
    return {
        "@context": "https://w3id.org/codemeta/3.0",
        "@type": "SoftwareSourceCode",
        "name": cited["title"],
        "description": cited["abstract"].strip(),
        "version": cited["version"],
        "license": f"https://spdx.org/licenses/{cited['license']}",
        "author": [person(author) for author in cited["authors"]],
        "keywords": cited["keywords"],
        "programmingLanguage": "Python",
        "citation": [reference["url"] for reference in cited.get("references", [])],
    } | ({"codeRepository": repository} if repository else {})


def zenodo(cited: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a deposit, for https://developers.zenodo.org; the description is HTML."""
    creators = []
    for author in cited["authors"]:
        family = " ".join(author[p] for p in ("name-particle", "family-names") if p in author)
        given = author.get("given-names")
        name = author.get("name") or (f"{family}, {given}" if given else family)
        creator = {"name": name}
        if "affiliation" in author:
            creator["affiliation"] = author["affiliation"]
        if "orcid" in author:
            creator["orcid"] = author["orcid"].removeprefix(ORCID)
        creators.append(creator)
    related = [("references", reference["url"]) for reference in cited.get("references", [])]
    if repository := cited.get("repository-code"):
        related.append(("isSupplementTo", repository))
    return {
        "upload_type": "software",
        "title": cited["title"],
        "description": html.escape(cited["abstract"].strip(), quote=False),
        "version": cited["version"],
        "license": cited["license"],
        "access_right": "open",
        "creators": creators,
        "keywords": cited["keywords"],
        "related_identifiers": [
            {"relation": relation, "identifier": address} for relation, address in related
        ],
    }


def paper(cited: dict[str, Any]) -> str:
    """Authors and summary of a preprint at NeuroLibre (https://docs.neurolibre.org)."""
    places = list(dict.fromkeys(a["affiliation"] for a in cited["authors"] if "affiliation" in a))
    authors = []
    for author in cited["authors"]:
        entry: dict[str, Any] = {"name": full_name(author)}
        if "orcid" in author:
            entry["orcid"] = author["orcid"].removeprefix(ORCID)
        if "affiliation" in author:
            entry["affiliation"] = places.index(author["affiliation"]) + 1
        authors.append(entry)
    front: dict[str, Any] = {"title": cited["title"], "tags": cited["keywords"], "authors": authors}
    if places:
        front["affiliations"] = [{"name": name, "index": i} for i, name in enumerate(places, 1)]
    if "date-released" in cited:
        front["date"] = str(cited["date-released"])
    front["bibliography"] = "paper.bib"
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{head}---\n\n# Summary\n\n{cited['abstract'].strip()}\n"


#: File -> its text.
FILES: dict[str, Callable[[dict[str, Any]], str]] = {
    "codemeta.json": lambda cited: _json(codemeta(cited)),
    ".zenodo.json": lambda cited: _json(zenodo(cited)),
    "paper.md": paper,
}


def _json(described: dict[str, Any]) -> str:
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    cited = read()
    for name, text in FILES.items():
        with building(ROOT / name) as path:
            path.write_text(text(cited), encoding="utf8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
