"""The built book as a PDF: python workflow/print_book.py

The pages are joined in their order and printed by Chromium. Sphinx's own single page would number
figures anew and lose the mark of what each page shows, simulated sections or real counts.
"""

from __future__ import annotations

import base64
import html
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chromium
import citation
from bs4 import BeautifulSoup, Tag

from sparsity_trap.files import building
from sparsity_trap.settings import ROOT, UserError

BUILT = ROOT / "_build" / "html"
PDF = ROOT / "_build" / "pdf" / "the-sparsity-trap.pdf"

#: What paper cannot show: scripts, what they draw, buttons, and code that is folded.
UNPRINTED = (
    "script, .interactive-plot, .plot-choices, .headerlink, button, select, input, iframe, "
    "details.hide"
)

#: Of the paper between its margins, in the units of CSS; the margins are in print.css.
WIDTH = round((210 - 2 * 17) / 25.4 * 96)

#: Done when every picture is there, every equation is set and every table fits the page. Returns
#: the pictures that are not there.
READY = """(async () => {
    if (window.MathJax?.startup) await MathJax.startup.promise;
    await document.fonts.ready;
    const missing = [];
    for (const image of document.images) await image.decode().catch(() => missing.push(image.src));
    const column = document.querySelector(".bd-article-container").getBoundingClientRect();
    for (const table of document.querySelectorAll("table")) {
        const box = table.getBoundingClientRect();
        const room = column.right - box.left;
        if (box.width > room) table.style.zoom = room / box.width;
    }
    return missing;
})()"""


def in_order(built: Path, first: str = "book/index.html") -> Iterator[tuple[str, BeautifulSoup]]:
    """Pages of a built book and their addresses in it, each with the link to the next."""
    address, seen = first, set()
    while address and address not in seen:
        seen.add(address)
        page = BeautifulSoup((built / address).read_text(encoding="utf8"), "html.parser")
        yield address, page
        link = page.select_one("a.right-next")
        address = _within(link["href"], address)[0] if link else ""


def _within(link: str, page: str) -> tuple[str, str]:
    """Address in the book and fragment that a link of a page leads to."""
    parts = urlsplit(link)
    path = os.path.normpath(os.path.join(os.path.dirname(page), unquote(parts.path)))
    return (path if parts.path else page), parts.fragment


def _slug(page: str) -> str:
    return page.removesuffix(".html").replace("/", "-")


def _chapter(address: str, page: BeautifulSoup, pages: set[str], top: str) -> Tag:
    """What a page holds, with identifiers, links and pictures that hold in the joined book.

    Parameters
    ----------
    address
        Of the page in the book.
    page
        As Sphinx wrote it; taken apart.
    pages
        Addresses of all pages.
    top
        Way from the joined book to the built one.
    """
    article = page.select_one("article.bd-article")
    for unprinted in article.select(UNPRINTED):
        unprinted.decompose()
    for other in article.select("noscript"):
        other.unwrap()
    for folded in article.select("details"):
        folded["open"] = ""
    for named in article.select("[id]"):
        if not named.find_parent("svg"):  # whose parts refer to each other
            named["id"] = f"{_slug(address)}--{named['id']}"
    for link in article.select("a[href]"):
        if urlsplit(link["href"]).scheme:
            continue
        target, fragment = _within(link["href"], address)
        if target in pages:
            link["href"] = f"#{_slug(target)}" + (f"--{fragment}" if fragment else "")
        else:  # a file to download, which does not travel with a PDF
            link.unwrap()
    for picture in article.select("img[src]"):
        if not urlsplit(picture["src"]).scheme:
            picture["src"] = f"{top}/{_within(picture['src'], address)[0]}"
        picture["loading"] = "eager"
    article["id"] = _slug(address)
    return article


def _contents(page: BeautifulSoup, address: str) -> tuple[str, dict[str, int]]:
    """Table of contents, from the sidebar of a page, and the level of each page in it."""
    lines, levels = [], {}
    for entry in page.select("nav.bd-links p.caption, nav.bd-links li > a"):
        text = html.escape(entry.get_text().strip())
        if entry.name == "p":
            lines.append(f'<p class="part">{text}</p>')
            continue
        target = _within(entry["href"], address)[0]
        levels[target] = len(entry.find_parents("li"))
        link = f'<a href="#{_slug(target)}">{text}</a>'
        lines.append(f'<p class="level-{levels[target]}">{link}</p>')
    return "\n".join(lines), levels


def join(built: Path, joined: Path, title: str, authors: str) -> None:
    """Write the book as one page, for printing.

    Parameters
    ----------
    built
        Folder of the built book.
    joined
        The file to write, which finds pictures and styles in `built`.
    title, authors
        For the title page.
    """
    found = dict(in_order(built))
    pages, top = set(found), os.path.relpath(built, joined.parent)
    first, front = next(iter(found.items()))
    contents, levels = _contents(front, first)
    head = [tag for tag in front.select("head link[rel=stylesheet], head style")]
    for sheet in front.select("head link[rel=stylesheet]"):
        sheet["href"] = f"{top}/{_within(sheet['href'], first)[0]}"
    mathjax = ""
    marks: dict[str, str] = {}
    chapters = []
    footer = front.select_one(".built-from")
    for address, page in found.items():
        script = page.select_one('script[src*="mathjax"]')
        if script and not mathjax:
            options = page.find("script", string=lambda text: text and "window.MathJax" in text)
            script["src"] = f"{top}/{_within(script['src'], address)[0]}"
            mathjax = f"{options or ''}{script}"
        banner = page.select_one(".bd-header-announcement__content")
        mark = " ".join(banner.get_text().split()) if banner else ""
        name = marks.setdefault(mark, f"mark-{len(marks)}")
        chapter = _chapter(address, page, pages, top)
        level = levels.get(address, 1)
        chapters.append(f'<div class="chapter level-{level} {name}">{chapter}</div>')
    rules = "".join(
        f"@page {name} {{ @top-left {{ content: {_css(mark)} }} }} .{name} {{ page: {name} }}\n"
        for mark, name in marks.items()
    )
    joined.write_text(
        f"""<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8">
<title>{html.escape(title)}</title>
{"".join(map(str, head))}<link rel="stylesheet" href="{top}/_static/print.css">
<style>{rules}</style>{mathjax}</head>
<body><div class="bd-main"><div class="bd-content"><div class="bd-article-container">
<div class="cover mark-0"><h1>{html.escape(title)}</h1><p>{html.escape(authors)}</p>
{footer or ""}<h2>Contents</h2><div class="contents">{contents}</div></div>
{"".join(chapters)}</div></div></div></body></html>""",
        encoding="utf8",
    )


def _css(text: str) -> str:
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'


def to_pdf(page: Path, pdf: Path) -> None:
    """Print a page.

    Raises
    ------
    UserError
        There is no Chromium, or the page lacks a picture.
    """
    program = chromium.find()
    if program is None:
        raise UserError("Chromium was not found: install it (on Debian: apt install chromium)")
    with tempfile.TemporaryDirectory() as profile, building(pdf) as partial:
        browser = chromium.Chromium(program, Path(profile))
        try:
            browser("Emulation.setEmulatedMedia", media="print")
            browser(
                "Emulation.setDeviceMetricsOverride",
                width=WIDTH, height=1000, deviceScaleFactor=1, mobile=False,
            )  # fmt: skip
            browser.open(page.resolve().as_uri())
            missing = browser.promised(READY)
            if missing:
                raise UserError(f"the book lacks {missing[0]}: run make book")
            handle = browser(
                "Page.printToPDF", preferCSSPageSize=True, printBackground=True,
                generateTaggedPDF=True, generateDocumentOutline=True,
                transferMode="ReturnAsStream",
            )["stream"]  # fmt: skip
            with partial.open("wb") as file:
                last = False
                while not last:
                    piece = browser("IO.read", handle=handle, size=1 << 20)
                    file.write(base64.b64decode(piece["data"]))
                    last = piece["eof"]
        finally:
            browser.close()


def main() -> None:
    if not (BUILT / "index.html").is_file():
        raise UserError("there is no book in _build/html yet: run make book")
    cited = citation.read()
    joined = PDF.with_suffix(".html")
    joined.parent.mkdir(parents=True, exist_ok=True)
    join(BUILT, joined, cited["title"], ", ".join(map(citation.full_name, cited["authors"])))
    to_pdf(joined, PDF)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
