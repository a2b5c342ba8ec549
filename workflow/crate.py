"""Metadata of an archived build: an RO-Crate (https://w3id.org/ro/crate/1.1).

It follows Workflow Run Crate 0.5, whose validators exist; that profile builds on version 1.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from citation import person

from sparsity_trap.settings import SOURCE_NAMES

SPECIFICATION = "https://w3id.org/ro/crate/1.1"
METADATA = "ro-crate-metadata.json"
WORKFLOW = "source/workflow/Snakefile"

#: Identifier of a profile -> its name and version; the last is that of the metadata too.
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": {"name": "Process Run Crate", "version": "0.5"},
    "https://w3id.org/ro/wfrun/workflow/0.5": {"name": "Workflow Run Crate", "version": "0.5"},
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": {
        "name": "Workflow RO-Crate",
        "version": "1.0",
    },
}

#: Folders that are described as a whole, and what they hold.
FOLDERS = {
    "book/": "The book: open book/index.html in a browser. Nothing is loaded from another host",
    "source/": "The program and the text as they were: `make book` there repeats the build",
    "source/notebooks/": "The analysis, one script per page (jupytext percent format)",
    "source/sparsity_trap/": "The module: losses, decoders, metrics, and what feeds them",
    "source/presets/": "Every setting of a run, by preset",
    "results/tables/": "Tables of the pages, and the numbers behind each figure",
    "results/provenance/": "Of each training run: settings, commit, hardware, versions, time",
}

#: Single files that are described.
FILES = {
    "README.md": "What is in this archive",
    "the-sparsity-trap.pdf": "The book in one file, for reading and printing",
    "source/requirements.lock.txt": "Every package of the environment, in the version used",
    "source/CITATION.cff": "How to cite this work",
    "source/LICENSE": "Licence of the program and the text",
    "results/numbers.json": "Every number that the text quotes, by key",
    "results/run.json": "What was built: source of the sections, preset, commit, hardware",
    "results/genes.csv": "Scores of each gene in each run, in the simulated worlds too",
}

#: Formats by the end of a file's name.
FORMATS = {
    ".csv": "text/csv", ".json": "application/json", ".md": "text/markdown", ".py": "text/x-python",
    ".pdf": "application/pdf", ".cff": "text/yaml", ".yaml": "text/yaml",
}  # fmt: skip


def folders(names: Iterable[str]) -> list[str]:
    """Described folders that hold one of the files."""
    names = list(names)
    return [folder for folder in FOLDERS if any(name.startswith(folder) for name in names)]


def describe(
    sizes: dict[str, int], run: dict[str, str], cited: dict[str, Any], made: datetime
) -> dict[str, Any]:
    """Metadata of a crate.

    Parameters
    ----------
    sizes
        Path in the crate -> bytes, for every file but the metadata.
    run
        From ``run.json``.
    cited
        From ``CITATION.cff``.
    made
        When the book was built.

    Returns
    -------
    JSON-LD of ``ro-crate-metadata.json``.
    """
    inputs = [f"source/presets/{run['preset']}.yaml", "source/requirements.lock.txt"]
    files = [_file(name, size) for name, size in sizes.items() if _alone(name) or name in inputs]
    parts = [*folders(sizes), *(file["@id"] for file in files), WORKFLOW]
    authors = _authors(cited)
    licence = f"https://spdx.org/licenses/{cited['license']}"
    action = {
        "@id": "#build",
        "@type": "CreateAction",
        "name": f"make book PRESET={run['preset']} SOURCE={run['source']}",
        "description": f"commit {run['commit']}; trained in {run['training']} on {run['hardware']}",
        "endTime": made.isoformat(timespec="seconds"),
        "instrument": {"@id": WORKFLOW},
        "object": _links(name for name in inputs if name in sizes),
        "result": _links(part for part in parts if part.startswith(("book/", "results/"))),
    }
    language = {
        "@id": "https://w3id.org/workflowhub/workflow-ro-crate#snakemake",
        "@type": "ComputerLanguage",
        "name": "Snakemake",
        "identifier": {"@id": "https://snakemake.readthedocs.io"},
        "url": {"@id": "https://snakemake.readthedocs.io"},
    }
    workflow = {
        "@id": WORKFLOW,
        "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
        "name": "Workflow from sections to the book",
        "version": cited["version"],
        "encodingFormat": "text/plain",
        "programmingLanguage": {"@id": language["@id"]},
    }
    graph = [
        {
            "@id": METADATA,
            "@type": "CreativeWork",
            "about": {"@id": "./"},
            "conformsTo": _links([SPECIFICATION, next(reversed(PROFILES))]),
        },
        _root(run, cited, made) | {"license": {"@id": licence}, "hasPart": _links(parts)},
        workflow,
        action,
        language,
        {"@id": licence, "@type": "CreativeWork", "name": cited["license"], "url": licence},
        *authors,
        *({"@id": at, "@type": "CreativeWork"} | named for at, named in PROFILES.items()),
        *({"@id": f, "@type": "Dataset", "name": FOLDERS[f]} for f in folders(sizes)),
        *files,
    ]
    return {"@context": f"{SPECIFICATION}/context", "@graph": graph}


def _root(run: dict[str, str], cited: dict[str, Any], made: datetime) -> dict[str, Any]:
    """The crate as a whole."""
    source = SOURCE_NAMES[run["source"]]
    return {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{cited['title']} ({source[0].lower() + source[1:]}, preset {run['preset']})",
        "description": f"{cited['abstract'].strip()} This build shows: {source}.",
        "datePublished": made.date().isoformat(),
        "author": _links(f"#author-{i}" for i, _ in enumerate(cited["authors"])),
        "keywords": ", ".join(cited["keywords"]),
        "version": cited["version"],
        "conformsTo": _links(PROFILES),
        "mainEntity": {"@id": WORKFLOW},
        "mentions": {"@id": "#build"},
    }


def _authors(cited: dict[str, Any]) -> list[dict[str, Any]]:
    """People and groups, and where they work: an entity each."""
    found = []
    for i, author in enumerate(cited["authors"]):
        known = person(author) | {"@id": f"#author-{i}"}
        if "orcid" in author:
            known["identifier"] = {"@id": author["orcid"]}
        if "affiliation" in known:
            found.append({"@id": f"#affiliation-{i}"} | known["affiliation"])
            known["affiliation"] = {"@id": f"#affiliation-{i}"}
        found.append(known)
    return found


def _alone(name: str) -> bool:
    """Whether a file is described by itself, not with its folder."""
    folder = PurePosixPath(name).parts[:2]
    return name in FILES or folder in {
        ("results", "tables"), ("results", "provenance"), ("source", "notebooks"),
    }  # fmt: skip


def _file(name: str, size: int) -> dict[str, Any]:
    path = PurePosixPath(name)
    found: dict[str, Any] = {"@id": quote(name, safe="/+"), "@type": "File"}
    found |= {"name": FILES.get(name, path.name), "contentSize": str(size)}
    found["encodingFormat"] = FORMATS.get(path.suffix, "text/plain")
    return found | ({"about": {"@id": "./"}} if name == "README.md" else {})


def _links(names: Iterable[str]) -> list[dict[str, str]] | dict[str, str]:
    """References; one of them by itself."""
    links = [{"@id": name} for name in names]
    return links[0] if len(links) == 1 else links
