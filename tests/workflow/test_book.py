"""The book: its extension, its table of contents, and the pages of the smoke book."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
NUMBERS = {
    "arm.E.pcc_8um": 0.36849,
    "delta.pcc_8um": -0.1,
    "cohort.n_patches.P5": 1234,
    "cohort.sparsity.P5": 0.938,
    "delta.matched.pcc_8um": None,
    "preset.name": "laptop",
}


@pytest.fixture
def build(tmp_path):
    """Build one page with the extension; return (exit status, page as text, warnings)."""

    def run(page: str, numbers: dict | None = NUMBERS) -> tuple[int, str, str]:
        extension = str(BOOK / "_ext")
        (tmp_path / "conf.py").write_text(
            f"import sys\nsys.path.append({extension!r})\n"
            "extensions = ['myst_parser', 'sparsity_trap_book']\n"
            "myst_enable_extensions = ['colon_fence']\nsparsity_trap_executed = 'executed'\n"
        )
        (tmp_path / "index.md").write_text(f"# Page\n\n{page}\n")
        (tmp_path / "executed").mkdir()
        (tmp_path / "executed" / "run.json").write_text(json.dumps({"source": "simulated"}))
        if numbers is not None:
            (tmp_path / "executed" / "numbers.json").write_text(json.dumps(numbers))
        done = subprocess.run(
            [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "text", ".", "out"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        text = tmp_path / "out" / "index.txt"
        return done.returncode, text.read_text() if text.is_file() else "", done.stderr

    return run


def test_val_formats_numbers_in_sentences_and_tables(build):
    status, text, warnings = build(
        "Plain {val}`arm.E.pcc_8um:.3f`, signed {val}`delta.pcc_8um:+.3f`, "
        "grouped {val}`cohort.n_patches.P5:,`, per cent {val}`cohort.sparsity.P5:.1%`, "
        "null {val}`delta.matched.pcc_8um:+.3f`, text {val}`preset.name`.\n\n"
        "| a | b |\n|---|---|\n| cell | {val}`arm.E.pcc_8um:.2f` |\n"
    )
    assert status == 0, warnings
    assert "Plain 0.368, signed −0.100, grouped 1,234, per cent 93.8%" in " ".join(text.split())
    assert "null undefined, text laptop." in " ".join(text.split())
    assert re.search(r"cell\s*\|\s*0\.37", text)


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("{val}`arm.E.pcc_8`", "unknown key 'arm.E.pcc_8' on page 'index'; near matches: arm.E.p"),
        ("{val}`preset.name:.3f`", "key 'preset.name' on page 'index' cannot be shown as '.3f'"),
    ],
)
def test_val_that_cannot_be_shown_fails_the_build(build, page, expected):
    status, _, warnings = build(page)
    assert status != 0
    assert expected in warnings
    assert "index.md:3" in warnings


def test_missing_numbers_name_the_remedy(build):
    status, _, warnings = build("{val}`preset.name`", numbers=None)
    assert status != 0
    assert "numbers.json is missing; run `make book`" in warnings


def test_when_shows_its_content_only_with_the_number(build):
    status, text, warnings = build(
        ":::{when} preset.name\nShown for {val}`preset.name`.\n:::\n\n"
        ":::{when} delta.matched.pcc_8um\nNull.\n:::\n\n:::{when} arm.X.bias\nUnknown.\n:::\n"
    )
    assert status == 0, warnings
    assert "Shown for laptop." in text
    assert "Null." not in text and "Unknown." not in text


def test_run_files_offers_downloads(build):
    status, text, warnings = build("```{run-files} *.json\n```")
    assert status == 0, warnings
    assert text.index("numbers.json") < text.index("run.json")


@pytest.mark.parametrize(
    ("source", "banner"),
    [
        ("simulated", "Simulated sections · preset laptop"),
        ("tissue-map", "Simulated counts and H&amp;E on real cell-type maps · preset laptop"),
        ("spaceranger", "Real sections · preset laptop"),
    ],
)
def test_banner_and_footer_name_the_source(tmp_path, monkeypatch, source, banner):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    from sparsity_trap_book import show_source

    run = {"source": source, "preset": "laptop", "commit": "0123456789abcdef", "hardware": "2 <x>"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    config = SimpleNamespace(sparsity_trap_executed=".", html_theme_options={})
    show_source(SimpleNamespace(srcdir=tmp_path), config)
    assert banner in config.html_theme_options["announcement"]
    footer = config.html_theme_options["extra_footer"]
    assert "commit 0123456789ab" in footer and "2 &lt;x&gt;" in footer


def test_pages_of_other_evidence_have_a_banner_of_their_own(monkeypatch):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    from sparsity_trap_book import mark_evidence

    app = SimpleNamespace(config=SimpleNamespace(sparsity_trap_executed="book/executed"))
    found = {}
    for page in ("book/executed/11_record", "book/executed/04_sparsity", "book/11_record"):
        context = {"theme_announcement": "Simulated sections"}
        mark_evidence(app, page, "page.html", context, None)
        found[page] = context["theme_announcement"]
    assert "Printed numbers, real tissue" in found.pop("book/executed/11_record")
    assert set(found.values()) == {"Simulated sections"}


def test_only_what_the_table_of_contents_lists_is_built(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    from sparsity_trap_book import exclude_unlisted
    from sphinx_external_toc.parsing import parse_toc_yaml

    for name in ("index.md", "draft.md", "executed/01_data_P5.ipynb", "executed/arms.md", "a.css"):
        path = tmp_path / "book" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "results").mkdir()
    toc = tmp_path / "_toc.yml"
    toc.write_text("root: book/index\nsubtrees: [{entries: [{glob: book/executed/01_*}]}]")
    config = SimpleNamespace(
        source_suffix={".md": "", ".ipynb": ""}, exclude_patterns=[".*"],
        external_site_map=parse_toc_yaml(toc),
    )  # fmt: skip
    exclude_unlisted(SimpleNamespace(srcdir=tmp_path), config)
    aside = {".*", "_toc.yml", "results", "book/draft.md", "book/executed/arms.md"}
    assert set(config.exclude_patterns) == aside


def test_end_of_build_puts_viewers_beside_the_pages_and_drops_unused_icons(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    from sparsity_trap_book import add_assets

    source, built = tmp_path / "book" / "executed" / "viewer", tmp_path / "html"
    app = SimpleNamespace(
        srcdir=tmp_path, outdir=built, builder=SimpleNamespace(format="html"),
        config=SimpleNamespace(sparsity_trap_executed="book/executed"),
    )  # fmt: skip
    source.mkdir(parents=True)
    (source / "PIGR-mse.webp").write_bytes(b"1")
    stale = built / "book" / "executed" / "viewer" / "ACTB-mse.webp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    page = built / "page.html"
    page.write_text(
        '<link href="_static/vendor/fontawesome/6.5.2/css/all.min.css" rel="stylesheet" />'
        '<link rel="preload" as="font" href="_static/vendor/fontawesome/6/fa-solid-900.woff2" />\n'
        '<link rel="preload" as="font" href="_static/vendor/fontawesome/6/fa-brands-400.woff2" />\n'
        '<script src="_static/vendor/fontawesome/6.5.2/js/all.min.js?digest=1"></script>\n'
        '<script src="_static/doctools.js"></script>'
    )
    add_assets(app, None)
    assert [Path(url).name for url in Loads(page).urls] == [
        "all.min.css", "fa-solid-900.woff2", "doctools.js",
    ]  # fmt: skip
    assert [path.name for path in stale.parent.iterdir()] == ["PIGR-mse.webp"]
    assert {"plotly.js", "plots.js"} <= {path.name for path in (built / "_assets").iterdir()}
    assert not (built / "_static").exists()


@pytest.fixture
def buttons(tmp_path, monkeypatch):
    """Buttons of one page, by text, when the repository is known by an address."""
    monkeypatch.syspath_prepend(BOOK / "_ext")
    from sparsity_trap_book import add_repository_buttons

    def of(address: str, path: str | None) -> dict[str, str]:
        app = SimpleNamespace(
            srcdir=ROOT, env=SimpleNamespace(doc2path=lambda page, base: path),
            config=SimpleNamespace(
                sparsity_trap_repository=address, sparsity_trap_executed="book/executed"
            ),
        )  # fmt: skip
        context = {"header_buttons": []}
        add_repository_buttons(app, "page", "page.html", context, path and object())
        return {
            b["text"]: b["url"] for group in context["header_buttons"] for b in group["buttons"]
        }

    return of


def test_buttons_point_to_what_the_repository_holds(buttons):
    home = "https://github.com/owner/trap"
    for page, script in {
        "01_data_P5": "01_data",
        "02_train_E": "02_train",
        "05b_browser": "05b_browser",
    }.items():
        assert buttons(home, f"book/executed/{page}.ipynb") == {
            "Repository": home,
            "Source of this page": f"{home}/blob/HEAD/notebooks/{script}.py",
            "Run on Binder": "https://mybinder.org/v2/gh/owner/trap/HEAD"
            f"?urlpath=%2Flab%2Ftree%2Fnotebooks%2F{script}.py",
        }  # fmt: skip
        assert (ROOT / "notebooks" / f"{script}.py").is_file()
    assert buttons(home, "book/problem.md") == {
        "Repository": home,
        "Source of this page": f"{home}/blob/HEAD/book/problem.md",
    }
    assert buttons(home, None) == {"Repository": home}
    gitlab = buttons("https://gitlab.example.org/a/b", "book/executed/08_dial.ipynb")
    assert gitlab["Source of this page"].endswith("/a/b/-/blob/HEAD/notebooks/08_dial.py")
    assert "Run on Binder" not in gitlab
    assert buttons("", "book/problem.md") == {}


@pytest.mark.parametrize(
    ("address", "right"),
    [
        ("https://github.com/owner/trap", True),
        ("https://gitlab.example.org/group/sub/trap", True),
        ("", True),
        ("git@github.com:owner/trap.git", False),
        ("https://me:secret@github.com/owner/trap", False),
        ("https://github.com/owner", False),
        ("javascript:alert(1)", False),
    ],
)
def test_address_of_the_repository_is_checked(monkeypatch, address, right):
    monkeypatch.syspath_prepend(BOOK / "_ext")
    import sparsity_trap_book

    warnings = []
    monkeypatch.setattr(
        sparsity_trap_book.logger,
        "warning",
        lambda text, *values, **_: warnings.append(text % values),
    )
    config = SimpleNamespace(sparsity_trap_repository=address)
    sparsity_trap_book.check_repository(None, config)
    assert config.sparsity_trap_repository == (address if right else "")
    assert len(warnings) == (not right)
    assert "secret" not in "".join(warnings)


def toc_files(node) -> list[str]:
    """Every file named in the table of contents, in order."""
    if isinstance(node, list):
        return [name for child in node for name in toc_files(child)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("root", "file", "glob") if key in node]
    return own + [name for value in node.values() for name in toc_files(value)]


def test_toc_lists_every_chapter_and_only_files_that_exist():
    files = toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    written = {name for name in files if not name.startswith("book/executed/")}
    assert written == {f"book/{path.stem}" for path in BOOK.glob("*.md")}
    assert len(files) == len(set(files))


def test_chapters_need_only_the_arms_that_every_preset_trains():
    text = "".join(path.read_text() for path in BOOK.glob("*.md"))
    text = re.sub(r"^ *:::\{when\}.*?^ *:::$", "", text, flags=re.MULTILINE | re.DOTALL)
    keys = set(re.findall(r"\{val\}`([^`:]+)", text))
    assert {key.split(".")[1] for key in keys if key.startswith("arm.")} == {"D", "E"}
    # Contrasts of further arms, settings of simulated sections and single patients are optional.
    optional = r"delta\.\w+\.|simulation\.|cohort\.\w+\."
    assert not [key for key in keys if re.match(optional, key)]


def test_chapters_take_published_numbers_from_one_file():
    from sparsity_trap.analysis import published

    text = "".join(path.read_text() for path in BOOK.glob("*.md"))
    keys = set(re.findall(r"\{val\}`published\.([^`:]+)", text))
    assert keys <= {*published.SUMMARY, "p_value"}
    # Written out, a published value would miss a correction of that file.
    printed = {f"{v:.3f}" for v in published.SUMMARY.values() if isinstance(v, float)}
    assert not [value for value in printed if value in text]


def test_every_reference_is_cited_and_can_be_found():
    references = parse_file(BOOK / "references.bib").entries  # a key twice is an error
    pages = [*BOOK.glob("*.md"), *(ROOT / "notebooks").glob("*.py")]
    roles = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", "".join(map(Path.read_text, pages)))
    assert {key.strip() for keys in roles for key in keys.split(",")} == set(references)
    for key, entry in references.items():
        assert entry.persons["author"] and {"title", "year"} <= set(entry.fields), key
        assert "doi" in entry.fields or "url" in entry.fields, key


def test_no_script_lies_where_every_page_would_load_it():
    assert not list((BOOK / "_static").rglob("*.js"))


def test_citation_file_is_complete_and_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["title"] and citation["message"]
    assert all("name" in a or "family-names" in a for a in citation["authors"])


class Loads(HTMLParser):
    """Collects what a page loads without a click."""

    def __init__(self, page: Path):
        super().__init__()
        self.urls: list[str] = []
        self.feed(page.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in {"stylesheet", "preload", "icon"}:
            return
        wanted = {"link": "href", "object": "data"}.get(tag, "src")
        if tag in {
            "script",
            "link",
            "img",
            "iframe",
            "source",
            "video",
            "audio",
            "embed",
            "object",
        }:
            self.urls += [values[wanted]] if values.get(wanted) else []


@pytest.fixture(scope="module")
def html(smoke_book) -> Path:
    """Folder of the built smoke book."""
    return smoke_book / "_build" / "html"


@pytest.fixture(scope="module")
def pages(html) -> dict[Path, list[str]]:
    """Every page of the built book with the addresses it loads."""
    found = [page for page in html.rglob("*.html") if "_static" not in page.parts]
    assert len(found) > len(list(BOOK.glob("*.md")))
    return {page: Loads(page).urls for page in found}


@pytest.mark.slow
def test_no_page_loads_from_another_host(pages, html):
    foreign = {
        f"{page.relative_to(html)}: {url}"
        for page, urls in pages.items()
        for url in urls
        if re.match(r"(?:https?:)?//", url)
    }
    for sheet in html.rglob("*.css"):
        for url in re.findall(
            r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\") ]+)", sheet.read_text()
        ):
            foreign.add(f"{sheet.relative_to(html)}: {url}")
    assert not foreign


@pytest.mark.slow
def test_every_file_that_a_page_loads_exists(pages, html):
    missing = {
        f"{page.relative_to(html)}: {url}"
        for page, urls in pages.items()
        for url in urls
        if not re.match(r"(?:https?:|data:|//|#)", url)
        and not (page.parent / re.split(r"[?#]", url)[0]).exists()
    }
    assert not missing


@pytest.mark.slow
def test_only_pages_with_a_plot_fetch_plotly_and_none_waits_for_it(pages):
    for page, urls in pages.items():
        assert not any(url.endswith("_assets/plotly.js") for url in urls), page
        loads = any(url.endswith("_assets/plots.js") for url in urls)
        assert loads == ('class="interactive-plot"' in page.read_text(encoding="utf8")), page


@cache
def sent(file: Path) -> int:
    """Bytes of a file on their way to a reader: hosts compress text."""
    content = file.read_bytes()
    return len(gzip.compress(content) if file.suffix in (".html", ".css", ".js") else content)


@pytest.mark.slow
def test_every_page_loads_less_than_3_mb(pages):
    for page, urls in pages.items():
        files = {
            (page.parent / re.split(r"[?#]", url)[0]).resolve()
            for url in urls
            if not url.startswith(("data:", "#"))
        }
        size = sum(sent(file) for file in {page, *files} if file.is_file())
        assert size < 3_000_000, f"{page}: {size / 1e6:.2f} MB"


@pytest.mark.slow
def test_front_page_leads_into_the_book(html):
    target = re.search(r"url=([^\"]+)", (html / "index.html").read_text())
    assert target and (html / target[1]).is_file()


@pytest.mark.slow
def test_every_page_names_its_source(pages, html):
    for page in pages:
        text = page.read_text(encoding="utf8")
        # A report card has a mark of its own, as it is no page of the theme.
        said = 'class="banner"' if page.parent.name == "score" else "bd-header-announcement"
        assert said in text or page == html / "index.html", page
        assert not re.search("⟨[^⟩]*⟩", text), f"{page}: a number that the run does not have"
