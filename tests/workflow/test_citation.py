"""CITATION.cff is the one place for names, title, version and licence; the rest follows it."""

from __future__ import annotations

import doctest
import json
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

from sparsity_trap.settings import UserError

sys.path.append(str(ROOT / "workflow"))
import citation  # noqa: E402 - a script beside the module

CITED = citation.read()
PEOPLE = [
    {
        "family-names": "Beethoven",
        "given-names": "Ludwig",
        "name-particle": "van",
        "orcid": "https://orcid.org/0000-0002-1825-0097",
        "affiliation": "Court of Bonn",
    },
    {"name": "The others"},
]


@pytest.mark.parametrize("name", citation.FILES)
def test_files_follow_the_citation(name):
    assert (ROOT / name).read_text() == citation.FILES[name](CITED), "run make metadata"


def test_the_project_has_the_same_title_version_and_licence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {key: project[key] for key in ("description", "version", "license")}
    assert named == {
        "description": CITED["title"], "version": CITED["version"], "license": CITED["license"],
    }  # fmt: skip
    book = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert CITED["title"].startswith(book["title"]) and "author" not in book
    assert (ROOT / "LICENSE").read_text().startswith(f"{CITED['license']} License")
    assert f"## [{CITED['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_people_and_groups_keep_what_is_known_of_them():
    cited = CITED | {"authors": PEOPLE, "repository-code": "https://example.org/a/b"}
    meta, zenodo = citation.codemeta(cited), citation.zenodo(cited)
    assert meta["author"] == [
        {
            "@id": "https://orcid.org/0000-0002-1825-0097",
            "@type": "Person",
            "name": "Ludwig van Beethoven",
            "familyName": "van Beethoven",
            "givenName": "Ludwig",
            "affiliation": {"@type": "Organization", "name": "Court of Bonn"},
        },
        {"@type": "Organization", "name": "The others"},
    ]
    assert zenodo["creators"] == [
        {
            "name": "van Beethoven, Ludwig",
            "affiliation": "Court of Bonn",
            "orcid": "0000-0002-1825-0097",
        },
        {"name": "The others"},
    ]
    _, front, text = citation.paper(cited).split("---\n")
    assert yaml.safe_load(front)["authors"] == [
        {"name": "Ludwig van Beethoven", "orcid": "0000-0002-1825-0097", "affiliation": 1},
        {"name": "The others"},
    ]
    assert yaml.safe_load(front)["affiliations"] == [{"name": "Court of Bonn", "index": 1}]
    assert CITED["abstract"].strip() in text
    assert meta["codeRepository"] == zenodo["related_identifiers"][-1]["identifier"]
    for name in ("title", "version"):
        assert zenodo[name] == meta["name" if name == "title" else name] == CITED[name]
    assert "codeRepository" not in json.loads((ROOT / "codemeta.json").read_text())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("just words", "not in the Citation File Format"),
        ("a: [", "not in the Citation File Format"),
        (yaml.safe_dump(CITED | {"license": ""}), "lacks license"),
        (yaml.safe_dump(CITED | {"authors": [{"given-names": "Ada"}]}), "has no name"),
        (yaml.safe_dump(CITED | {"authors": ["Ada"]}), "has no name"),
    ],
)
def test_what_cannot_be_cited_is_said(tmp_path, text, said):
    path = tmp_path / "CITATION.cff"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        citation.read(path)


def test_a_preprint_server_finds_what_it_asks_for():
    front = yaml.safe_load((ROOT / "paper.md").read_text().split("---\n")[1])
    assert (ROOT / front["bibliography"]).samefile(ROOT / "book" / "references.bib")
    for name in ("_config.yml", "_toc.yml"):
        assert (ROOT / "content" / name).samefile(ROOT / name)
    toc = yaml.safe_load((ROOT / "content" / "_toc.yml").read_text())
    assert (ROOT / "content" / f"{toc['root']}.md").is_file()
    assert (ROOT / "binder" / "requirements.txt").is_file()


def test_examples_are_right():
    assert doctest.testmod(citation).attempted and not doctest.testmod(citation).failed
