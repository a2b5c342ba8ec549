"""Sphinx extension of the book: numbers of a run in prose, the source banner, local assets.

Everything the book reads from a run lies in one folder (``sparsity_trap_executed``):
``numbers.json`` for the role ``val``, ``run.json`` for the banner and the footer, and files that
pages offer for download.
"""

from __future__ import annotations

import difflib
import html
import importlib.util
import json
import math
import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole
from sphinx.util.matching import patmatch

from sparsity_trap.analysis.families import MARKED
from sparsity_trap.settings import SOURCE_NAMES

logger = logging.getLogger(__name__)

#: The part of MathJax that pages with equations load: one script, its fonts, TeX extensions.
MATHJAX_PARTS = ("tex-chtml.js", "output/chtml", "input/tex/extensions")

#: The theme brings Font Awesome twice, as a style sheet with fonts and as a script of 1.5 MB, and
#: fetches two fonts that the book has no icon of. The style sheet and one font are enough; the
#: theme has no option for less.
UNUSED_ICONS = re.compile(
    r'<script src="[^"]*/fontawesome/[^"]*\.js[^"]*"></script>\s*'
    r'|<link rel="preload"[^>]*/fontawesome/[^>]*fa-(?:brands|regular)[^>]*>\s*'
)

#: Page of a repository: host, owner, name; no password and nothing below.
REPOSITORY = re.compile(r"https://[\w.-]+/[\w./-]*[\w-]/[\w.-]+")

#: What readers of speech are told wrongly, by pattern and replacement: a control without a name,
#: two whose name is not the text they show, and a list of what are not list items. No option of
#: the theme, of MyST-NB or of docutils changes these; left alone, they fail the rules of axe-core.
SPOKEN = (
    (re.compile(r'<summary>(?=<span class="toctree-toggle")'), '<summary aria-label="Sections">'),
    (re.compile(r'(<button class="btn search-button-field [^>]*?) aria-label="[^"]*"'), r"\1"),
    (re.compile(r'<summary aria-label="Toggle hidden content">'), "<summary>"),
    (re.compile(r'<div role="list" class="citation-list">'), '<div class="citation-list">'),
)

_REMEDY = "run `make book`, which stages it"


class Val(SphinxRole):
    """``{val}`key``` or ``{val}`key:format```: one number of the run.

    The format is a Python format specification (``.3f``, ``+.3f``, ``.0%``, ``,``). A null prints
    as "undefined". An unknown key or a format that does not fit is a warning, so a build with
    ``-W`` fails.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        key, _, spec = self.text.partition(":")
        try:
            text = format_value(read_numbers(self.env)[key], spec)
        except (FileNotFoundError, KeyError, ValueError) as error:
            text = f"⟨{key}⟩"
            problem = self._explain(error, key, spec)
            logger.warning("val: %s", problem, location=self.get_location(), type="sparsity_trap")
        return [nodes.inline(self.rawtext, text, classes=["val"])], []

    def _explain(self, error: Exception, key: str, spec: str) -> str:
        path = _executed(self.env) / "numbers.json"
        if isinstance(error, FileNotFoundError):
            return f"{path} is missing; {_REMEDY}"
        if isinstance(error, KeyError):
            near = difflib.get_close_matches(key, read_numbers(self.env), n=4, cutoff=0.4)
            hint = f"near matches: {', '.join(near)}" if near else "no key is like it"
            return f"unknown key '{key}' on page '{self.env.docname}'; {hint} ({path})"
        return f"key '{key}' on page '{self.env.docname}' cannot be shown as '{spec}': {error}"


def _executed(app: Sphinx | BuildEnvironment) -> Path:
    """Folder of what the book reads from a run."""
    return Path(app.srcdir, app.config.sparsity_trap_executed)


def read_numbers(env: BuildEnvironment) -> dict[str, Any]:
    """Read ``numbers.json``, on which the page then depends."""
    path = _executed(env) / "numbers.json"
    env.note_dependency(str(path))
    return _read_json(path)


@cache  # which lasts for one build
def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf8"))


def format_value(value: float | int | str | None, spec: str) -> str:
    """Text of one value, with a true minus sign; ``ValueError`` when the format does not fit."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "undefined"
    text = format(value, spec)
    return text if isinstance(value, str) else text.replace("-", "\N{MINUS SIGN}")


class When(Directive):
    """``{when} key``: content that appears only when the run gives that number.

    For arms that not every preset trains, and for settings of simulated sections.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            numbers = read_numbers(self.state.document.settings.env)
        except FileNotFoundError:
            return []
        if numbers.get(self.arguments[0]) is None:
            return []
        holder = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, holder)
        return holder.children


class RunFiles(Directive):
    """``{run-files} tables/*.csv``: a list of download links to files of the run, sorted."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        items = nodes.bullet_list(classes=["run-files"])
        for path in sorted(_executed(env).glob(self.arguments[0])):
            target = "/" + path.relative_to(env.srcdir).as_posix()
            link = addnodes.download_reference(
                "", "", nodes.literal(text=path.name), reftarget=target, refdoc=env.docname
            )
            items += nodes.list_item("", nodes.paragraph("", "", link))
        return [items] if len(items) else [nodes.paragraph(text="This run wrote no such file.")]


def show_source(app: Sphinx, config: Config) -> None:
    """Put the source of the sections into the banner and the footer of every page.

    The authors and the address of the repository are those of ``CITATION.cff``, by way of the run;
    an address from the environment goes first.
    """
    path = Path(app.srcdir, config.sparsity_trap_executed, "run.json")
    if not path.is_file():
        logger.warning("%s is missing; %s", path, _REMEDY, type="sparsity_trap")
        return
    run = {key: html.escape(str(value)) for key, value in json.loads(path.read_text()).items()}
    source = html.escape(SOURCE_NAMES.get(run["source"], run["source"]))
    preset = run.get("preset", "unknown")
    config.author = run.get("authors", "unknown")
    if run.get("repository") and not config.sparsity_trap_repository:
        config.sparsity_trap_repository = run["repository"]
    config.html_theme_options["announcement"] = (
        f'<span class="source source-{run.get("source")}">{source} · preset {preset}</span>'
    )
    run["commit"] = run.get("commit", "not recorded")[:16]
    names = {"data": "data", "preset": "preset", "commit": "commit", "seeds": "seeds"}
    names |= {"training": "trained in", "hardware": "on"}
    parts = [source, *(f"{name} {run.get(k, 'not recorded')}" for k, name in names.items())]
    config.html_theme_options["extra_footer"] = (
        f'<p class="built-from">Built from: {" · ".join(parts)}</p>'
    )


def exclude_unlisted(app: Sphinx, config: Config) -> None:
    """Leave out what the table of contents does not list.

    The extension that reads the table could do it (``only_build_toc_files``), but looks through all
    results for it, hundreds of thousands of files.
    """
    source, listed = Path(app.srcdir), getattr(config, "external_site_map", None)
    if listed is None:  # a book without such a table
        return
    aside = [path.name for path in source.iterdir() if path.name != "book"]
    for path in (source / "book").rglob("*"):
        name = path.relative_to(source)
        page = name.with_suffix("").as_posix()
        if (
            path.suffix in config.source_suffix
            and page not in listed
            and not any(patmatch(page, pattern) for pattern in listed.globs())
        ):
            aside.append(name.as_posix())
    config.exclude_patterns = [*config.exclude_patterns, *aside]


def mark_evidence(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Put another banner on pages that show no sections of the build."""
    page = Path(pagename)
    if page.name in MARKED and page.parent == Path(app.config.sparsity_trap_executed):
        mark = html.escape(MARKED[page.name].mark)
        context["theme_announcement"] = f'<span class="source">{mark}</span>'


def check_repository(app: Sphinx, config: Config) -> None:
    """Refuse a repository address from which no links could be made."""
    address = config.sparsity_trap_repository
    if address and not REPOSITORY.fullmatch(address):
        config.sparsity_trap_repository = ""
        logger.warning(
            "the repository's address is '%s': name its page in SPARSITY_TRAP_REPOSITORY or as "
            "repository-code in CITATION.cff, such as https://github.com/owner/name, or nothing",
            # An address with a password in it must not end up in a log.
            re.sub(r"//.*@", "//…@", address),
            type="sparsity_trap",
        )


def add_repository_buttons(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Link pages to their source and to Binder, where the address of the repository is known.

    The theme's own buttons would point to the executed notebooks, which no repository holds.
    """
    address = app.config.sparsity_trap_repository
    if not address:
        return
    buttons = [_button("Repository", address, "fas fa-code-branch")]
    if doctree is not None:
        source = page_source(app, pagename)
        kind = "/-/blob" if "gitlab" in address else "/blob"
        buttons.append(
            _button("Source of this page", f"{address}{kind}/HEAD/{source}", "fas fa-code")
        )
        if source.startswith("notebooks/") and address.startswith("https://github.com/"):
            binder = address.replace("https://github.com/", "https://mybinder.org/v2/gh/", 1)
            target = quote(f"/lab/tree/{source}", safe="")
            buttons.append(
                _button("Run on Binder", f"{binder}/HEAD?urlpath={target}", "fas fa-rocket")
            )
    group = {"type": "group", "tooltip": "Source", "label": "source-buttons"}
    group |= {"icon": "fas fa-code-branch", "buttons": buttons}
    context["header_buttons"].insert(0, group)


def _button(text: str, url: str, icon: str) -> dict[str, str]:
    return {"type": "link", "text": text, "url": url, "icon": icon}


def page_source(app: Sphinx, pagename: str) -> str:
    """File of the repository that a page is made from: for an executed notebook, its script."""
    path = Path(app.env.doc2path(pagename, base=False))
    if path.parent == Path(app.config.sparsity_trap_executed):
        for script in Path(app.srcdir, "notebooks").glob("*.py"):
            # 01_data_P5 is one of several pages of 01_data.
            if path.stem == script.stem or path.stem.startswith(f"{script.stem}_"):
                return f"notebooks/{script.name}"
    return path.as_posix()


def add_assets(app: Sphinx, error: Exception | None) -> None:
    """Put plotly.js, MathJax and the gene browser's pictures beside the pages; mend the pages.

    So no page loads anything from another host. The scripts stay out of ``_static``, where Jupyter
    Book would load each of them on every page. Pictures in ``viewer`` and report cards in ``score``
    of the folder of executed notebooks go to the same place in the book: next to the pages of the
    notebooks.
    """
    if error or app.builder.format != "html":
        return
    assets = Path(app.outdir, "_assets")
    mathjax = _package("sphinx-mathjax-offline") / "static" / "mathjax"
    for part in MATHJAX_PARTS:
        _copy(mathjax / part, assets / "mathjax" / part)
    put_plotly(assets)
    for name in ("viewer", "score"):
        place = Path(app.config.sparsity_trap_executed, name)
        shutil.rmtree(Path(app.outdir, place), ignore_errors=True)  # of another preset
        if Path(app.srcdir, place).is_dir():
            _copy(Path(app.srcdir, place), Path(app.outdir, place))
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text(encoding="utf8")
        mended = UNUSED_ICONS.sub("", text)
        for pattern, replacement in SPOKEN:
            mended = pattern.sub(replacement, mended)
        if mended != text:
            page.write_text(mended, encoding="utf8")


def put_plotly(folder: Path) -> None:
    """Write plotly.js, as its package has it, and beside it the script that fetches and uses it."""
    library = _package("plotly") / "package_data" / "plotly.min.js"
    # Else plotly.js looks for MathJax on another host.
    local = 'window.PlotlyConfig = { MathJaxConfig: "local" };\n'
    folder.joinpath("plotly.js").write_text(local + library.read_text("utf8"), encoding="utf8")
    _copy(_package("sparsity_trap.show") / "assets" / "plots.js", folder / "plots.js")


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension with Sphinx."""
    app.add_config_value("sparsity_trap_executed", "book/executed", "env", types=[str])
    known = os.environ.get("SPARSITY_TRAP_REPOSITORY", "").removesuffix("/")
    app.add_config_value("sparsity_trap_repository", known, "html", types=[str])
    app.add_role("val", Val())
    app.add_directive("when", When)
    app.add_directive("run-files", RunFiles)
    app.connect("config-inited", show_source)
    app.connect("config-inited", check_repository)
    # After the extension that reads the table of contents.
    app.connect("config-inited", exclude_unlisted, priority=901)
    # After the theme, which begins an empty list of buttons.
    app.connect("html-page-context", add_repository_buttons, priority=502)
    app.connect("html-page-context", mark_evidence)
    app.connect("build-finished", add_assets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
