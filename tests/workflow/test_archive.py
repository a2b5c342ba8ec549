"""The archive of a build: what is in it, what stays out, and that a validator passes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from checkers import ask
from conftest import ROOT

from sparsity_trap import settings as config
from sparsity_trap.presets import load_preset, other_worlds
from sparsity_trap.settings import UserError

sys.path.append(str(ROOT / "workflow"))
import archive  # noqa: E402 - a script beside the module
import crate  # noqa: E402

#: Terms of the crate as https://w3id.org/ro/crate/1.1/context has them (published under CC0), which
#: tests without a network cannot read. Most are those of schema.org.
SCHEMA = (
    "about", "affiliation", "author", "contentSize", "datePublished", "description",
    "encodingFormat", "endTime", "familyName", "givenName", "hasPart", "identifier", "instrument",
    "keywords", "license", "mainEntity", "mentions", "name", "object", "programmingLanguage",
    "result", "url", "version", "ComputerLanguage", "CreateAction", "CreativeWork", "Dataset",
    "Organization", "Person", "SoftwareSourceCode",
)  # fmt: skip
TERMS = {name: f"http://schema.org/{name}" for name in SCHEMA} | {
    "File": "http://schema.org/MediaObject",
    "conformsTo": "http://purl.org/dc/terms/conformsTo",
    "ComputationalWorkflow": "https://bioschemas.org/ComputationalWorkflow",
}

#: Validates the crate named, with the context given; prints what is wrong.
VALIDATE = """
import json, sys
from rocrate_validator.utils import http
context = json.load(sys.stdin)

class Answer:
    status_code, headers, text = 200, {"Content-Type": "application/ld+json"}, json.dumps(context)
    json = staticmethod(lambda: context)

asked = []
http.HttpRequester.get = lambda self, url, **_: asked.append(url) or Answer
from rocrate_validator import services
from rocrate_validator.models import ValidationSettings

result = services.validate(ValidationSettings(
    rocrate_uri=sys.argv[1], profile_identifier="workflow-run-crate-0.5",
    validate_profile_checks=False,
))
found = [f"{issue.check.identifier}: {issue.message}" for issue in result.get_issues()]
assert result.passed() == (not found)
assert set(asked) == {"https://w3id.org/ro/crate/1.1/context"}
print(json.dumps(found))
"""
MADE = datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC)
PRIVATE = (
    "cohort.yaml",
    ".env",
    "data/outs/he.btf",
    "results/smoke/tokens/P1",
    "notebooks/a.ipynb",
)
RUN = {"preset": "smoke", "source": "simulated", "commit": "c", "training": "1 s", "hardware": "h"}


@pytest.fixture
def build(tmp_path, monkeypatch) -> Path:
    """A checkout with a book, in a few small files."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    texts = dict.fromkeys(
        (
            "_build/html/index.html", "_build/html/book/a b.html", "workflow/Snakefile",
            "notebooks/01_data.py", "presets/smoke.yaml", "requirements.lock.txt", "LICENSE",
            "CITATION.cff", "book/a.md", "book/executed/numbers.json", "book/executed/tables/a.csv",
            "book/executed/tables/figures/mse+ssim.csv", "sparsity_trap/losses.py",
            "sparsity_trap/__pycache__/losses.pyc", "book/.executed.1.partial/run.json", *PRIVATE,
        ),
        "text",
    )  # fmt: skip
    texts["book/executed/run.json"] = json.dumps(RUN)
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    genes = pd.DataFrame({"gene": ["EPCAM", "VIM"], "pcc_8um": [0.25, 0.5]})
    controls = tmp_path / "book/executed/tables/controls.parquet"
    genes.to_parquet(controls)
    home = load_preset("smoke")
    for world in (home, *other_worlds(home).values()):
        for run in world.all_runs():
            world.run_dir(run).mkdir(parents=True)
            (world.run_dir(run) / "genes.parquet").write_bytes(controls.read_bytes())
            (world.run_dir(run) / "provenance.json").write_text("{}")
    return tmp_path


@pytest.fixture
def packed(build, tmp_path) -> Path:
    path = tmp_path / "archive.zip"
    archive.write(archive.collect(load_preset("smoke"), build), MADE, path)
    return path


def test_holds_book_source_numbers_tables_and_provenance(packed):
    home = load_preset("smoke")
    with zipfile.ZipFile(packed) as found:
        names = set(found.namelist())
        genes = pd.read_csv(found.open("results/genes.csv"))
        controls = pd.read_csv(found.open("results/tables/controls.csv"))
        readme = found.read("README.md").decode()
    assert names >= {
        "ro-crate-metadata.json", "book/index.html", "book/book/a b.html", "source/book/a.md",
        "source/workflow/Snakefile", "source/notebooks/01_data.py", "source/requirements.lock.txt",
        "results/numbers.json", "results/run.json", "results/tables/a.csv",
        f"results/provenance/home/{home.all_runs()[0].name}.json",
    }  # fmt: skip
    worlds = {"home": home} | other_worlds(home)
    assert set(genes["world"]) == set(worlds)
    assert len(genes) == 2 * sum(len(world.all_runs()) for world in worlds.values())
    assert list(genes["run"].unique()[:1]) == [home.all_runs()[0].name]
    assert list(controls["pcc_8um"]) == [0.25, 0.5]
    assert "Simulated sections · preset smoke" in readme


def test_leaves_out_what_is_private_compiled_or_computed(packed):
    names = zipfile.ZipFile(packed).namelist()
    hidden = ("__pycache__", "executed", "sections", "predictions")
    assert [n for n in names if any(part in n for part in (*PRIVATE, *hidden))] == []
    assert len(names) == len(set(names))


def test_every_file_of_the_repository_is_source():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = {path.relative_to(ROOT).as_posix() for path in archive.source_files()}
    assert {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()} <= found
    assert not [name for name in found if name.startswith(("book/executed", "results/smoke"))]


def test_the_same_build_gives_the_same_bytes(build, packed, tmp_path):
    again = tmp_path / "again.zip"
    archive.write(archive.collect(load_preset("smoke"), build), MADE, again)
    assert again.read_bytes() == packed.read_bytes()


def test_a_pdf_of_another_build_stays_out(build):
    pdf = build / "_build" / "pdf" / "the-sparsity-trap.pdf"
    pdf.parent.mkdir()
    pdf.write_text("pdf")
    assert pdf.name in archive.collect(load_preset("smoke"), build)
    os.utime(pdf, (0, 0))
    assert pdf.name not in archive.collect(load_preset("smoke"), build)


def test_a_book_of_something_else_is_refused(build):
    with pytest.raises(UserError, match="is of preset smoke, source simulated: run make book"):
        archive.collect(load_preset("laptop"), build)
    (build / "_build/html/index.html").unlink()
    with pytest.raises(UserError, match="no book in _build/html yet"):
        archive.collect(load_preset("smoke"), build)


def metadata(packed: Path) -> list[dict]:
    return json.loads(zipfile.ZipFile(packed).read(crate.METADATA))["@graph"]


def test_metadata_has_no_loose_ends(packed):
    graph = metadata(packed)
    known = {entity["@id"] for entity in graph}
    assert len(known) == len(graph)

    def links(value) -> list[str]:
        if isinstance(value, dict):
            return [value["@id"]]
        return [link for item in value for link in links(item)] if isinstance(value, list) else []

    told = {link for entity in graph for value in entity.values() for link in links(value)}
    assert {link for link in told - known if not link.startswith("https://")} == set()
    used = {key for entity in graph for key in entity if not key.startswith("@")}
    used |= {
        kind
        for e in graph
        for kind in ([e["@type"]] if str(e["@type"]) == e["@type"] else e["@type"])
    }
    assert used <= set(TERMS)


@pytest.mark.slow
def test_a_validator_passes_the_crate(packed):
    assert ask(VALIDATE, packed, given={"@context": TERMS}) == []
