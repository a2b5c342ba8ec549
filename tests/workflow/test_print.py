"""The printed book: pages joined in order, links that lead somewhere, numbers, nothing cut off."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from checkers import ask
from conftest import ROOT

from sparsity_trap.settings import UserError

sys.path.append(str(ROOT / "workflow"))
import print_book  # noqa: E402 - a script beside the module

PAGE = """<html><head><title>t</title></head><body>
<div class="bd-header-announcement"><div class="bd-header-announcement__content">{mark}</div></div>
<nav class="bd-links"><p class="caption">Part</p><ul><li><a href="{up}book/index.html">Front</a>
</li><li><a href="{up}book/run/a.html">1. First</a><ul><li><a href="{up}book/run/b%20c.html">
1.1. Below</a></li></ul></li></ul></nav>
<article class="bd-article"><section id="top"><h1>{title}<a class="headerlink">#</a></h1>{text}
</section></article>{following}<footer><p class="built-from">Built from: tests</p></footer>
</body></html>"""

TEXTS = {
    "book/index.html": (
        "Simulated sections", "Front",
        '<p>See <a href="run/a.html#here">the place</a>, <a href="run/b%20c.html">below</a>, '
        '<a href="../_downloads/x.csv">a file</a>, <a href="https://example.org">out</a>.</p>'
        '<img src="../_images/dot.png" width="50">',
        "run/a.html",
    ),
    "book/run/a.html": (
        'Real "counts"', "1. First",
        '<p id="here">Here. <a href="#top">up</a></p><details class="hide"><p>folded code</p>'
        '</details><details class="sd-dropdown"><p>dropped down</p></details>'
        '<div class="interactive-plot">interactive</div><noscript>without scripts</noscript>'
        f'<table><tr>{"<td>unbreakableword</td>" * 20}<td>last</td></tr></table>',
        "b%20c.html",
    ),
    "book/run/b c.html": ("Simulated sections", "1.1. Below", "<p>End.</p>", ""),
}  # fmt: skip

#: Text of each page, the pages that links lead to, titles of the outline, the right-most text, the
#: page's width, and the size of words.
READ = """
import json, sys
from pypdf import PdfReader

reader, right, sizes = PdfReader(sys.argv[1]), [], {}

def place(text, cm, tm, font, size):
    if text.strip():
        right.append(tm[4] * cm[0] + cm[4])
        sizes[text.strip()] = abs(size * tm[0] * cm[0])

texts = [page.extract_text(visitor_text=place) for page in reader.pages]
number = {page.indirect_reference.idnum: i for i, page in enumerate(reader.pages)}
named = reader.named_destinations
links = []
for page in reader.pages:
    for note in page.get("/Annots") or []:
        note = note.get_object()
        target = note.get("/Dest") or note["/A"].get("/D")
        if target is None:
            links.append(note["/A"]["/URI"])
        else:
            spot = named[target] if isinstance(target, str) else target
            page_of = spot.page if isinstance(target, str) else spot[0]
            links.append(number[page_of.idnum])
titles = [str(entry.title) for entry in reader.outline if not isinstance(entry, list)]
width = float(reader.pages[0].mediabox.width)
print(json.dumps([texts, links, titles, max(right), width, sizes]))
"""


@pytest.fixture
def book(tmp_path) -> Path:
    built = tmp_path / "html"
    for name, (mark, title, text, following) in TEXTS.items():
        up = "../" * name.count("/")
        link = f'<a class="right-next" href="{following}">next</a>' if following else ""
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        (built / name).write_text(
            PAGE.format(mark=mark, title=title, text=text, following=link, up=up)
        )
    (built / "_static").mkdir()
    shutil.copy(ROOT / "book" / "_static" / "print.css", built / "_static")
    (built / "_images").mkdir()
    shutil.copy(ROOT / "book" / "_static" / "example.png", built / "_images" / "dot.png")
    return built


@pytest.fixture
def joined(book, tmp_path) -> Path:
    path = tmp_path / "pdf" / "book.html"
    path.parent.mkdir()
    print_book.join(book, path, "The title", "A. Author")
    return path


def test_pages_are_joined_in_order_with_links_that_hold(joined):
    page = BeautifulSoup(joined.read_text(), "html.parser")
    chapters = page.select(".chapter")
    titles = [chapter.h1.get_text() for chapter in chapters]
    assert titles == ["Front", "1. First", "1.1. Below"]
    assert ["level-2" in chapter["class"] for chapter in chapters] == [False, False, True]
    known = [named["id"] for named in page.select("[id]")]
    assert len(known) == len(set(known))
    links = [link["href"] for link in page.select("a[href]")]
    inside = [link[1:] for link in links if link.startswith("#")]
    assert len(inside) == 6 and set(inside) <= set(known)
    assert [link for link in links if not link.startswith("#")] == ["https://example.org"]
    assert (joined.parent / page.img["src"]).is_file()


def test_what_paper_cannot_show_is_left_out(joined):
    page = BeautifulSoup(joined.read_text(), "html.parser")
    text = page.get_text()
    assert "dropped down" in text and "without scripts" in text and "Built from: tests" in text
    assert "folded code" not in text and "interactive" not in text and "1. First#" not in text
    assert page.select_one("details.sd-dropdown").has_attr("open")


def test_a_pdf_has_numbers_marks_links_and_nothing_beyond_the_margin(joined, tmp_path):
    if print_book.chromium.find() is None:
        pytest.skip("chromium is not installed")
    pdf = tmp_path / "book.pdf"
    print_book.to_pdf(joined, pdf)
    texts, links, titles, right, width, sizes = ask(READ, pdf)
    assert len(texts) == 4
    assert [f"{i} / 4" in text for i, text in enumerate(texts, 1)] == [True] * 4
    assert 'Real "counts"' in texts[2] and "Simulated" not in texts[2]
    assert "Simulated sections" in texts[1] and "Simulated sections" in texts[3]
    # Contents, then those of the text: to a place, to a page, out, and up.
    assert links == [1, 2, 3, 2, 3, "https://example.org/", 2]
    assert titles == ["The title", "Front", "1. First", "1.1. Below"]
    assert right < width - 17 / 25.4 * 72
    # Chromium shrinks a page to its widest table, unless the table is made to fit.
    assert sizes["1. First"] == pytest.approx(2 * 9.5, rel=0.01)


def test_missing_pictures_and_programs_are_said(joined, tmp_path, monkeypatch):
    (tmp_path / "html/_images/dot.png").unlink()
    if print_book.chromium.find():
        with pytest.raises(UserError, match=r"lacks .*dot\.png: run make book"):
            print_book.to_pdf(joined, tmp_path / "book.pdf")
        assert not (tmp_path / "book.pdf").exists()
    monkeypatch.setattr(print_book.chromium, "find", lambda: None)
    with pytest.raises(UserError, match="Chromium was not found"):
        print_book.to_pdf(joined, tmp_path / "book.pdf")
