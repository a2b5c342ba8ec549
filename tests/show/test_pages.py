"""Every page of the smoke book in Chromium without a network: errors, pictures, order, contrast."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

#: Rules of accessibility, from the npm registry.
AXE = "axe-core-4.14.1"
AXE_SHA512 = (
    "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
)

#: What Python writes of an object that has no picture, table or text of its own.
REPR = re.compile(
    r"<[\w.]+ object(?: at 0x[0-9a-f]+)?>|<[\w.]+ at 0x[0-9a-f]+>"
    r"|<(?:class|function|module) '?\w.*?>|\bText\([-\d.]+, "
)

#: One screen on, and from the end to the top: plots are drawn when a reader comes near them.
LOOK_ON = """
    scrollTo({
        top: scrollY + innerHeight < document.scrollingElement.scrollHeight - 2 ? scrollY + 900 : 0,
        behavior: "instant",
    })
"""

#: Until nothing on the page is drawn any more.
DRAWN = f"""
    ({LOOK_ON}, !document.querySelector(".math") || !!document.querySelector("mjx-container"))
    && [...document.querySelectorAll(".interactive-plot")].every(b => b.querySelector(".main-svg"))
    && [...document.querySelectorAll(".gene-browser, .loss-explorer")]
        .every(b => "ready" in b.dataset)
"""

PICTURES = """
    [...document.images].map(i => ({
        address: i.currentSrc.slice(-60), alt: i.alt, natural: i.naturalWidth * i.naturalHeight,
        shown: i.checkVisibility(), size: i.offsetWidth * i.offsetHeight,
    }))
"""

HEADINGS = """
    [...document.querySelectorAll("main :is(h1, h2, h3, h4, h5, h6)")]
        .filter(h => h.checkVisibility()).map(h => [Number(h.tagName[1]), h.textContent])
"""

#: What reaches beyond the right edge, and does not scroll in a box of its own.
TOO_WIDE = """
    document.scrollingElement.scrollWidth <= innerWidth ? [] :
        [...document.querySelectorAll("main *")]
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => e.tagName + "." + e.className).slice(0, 8)
"""

#: What follows more of its kind adds time to axe-core's work, not kinds of fault: rows of tables,
#: cells of code. Nothing of what is left depends on it.
SHORTEN = """
    document.querySelectorAll("main tbody tr:nth-child(n+9)").forEach(row => row.remove());
    [...document.querySelectorAll("main .highlight")].slice(4).forEach(code => code.remove())
"""

#: Pages of patients and arms, of one notebook each: axe-core looks at one.
ALIKE = re.compile("01_data_P[12]|02_train_D")


@pytest.fixture(scope="module")
def axe(pytestconfig) -> str:
    """The script of axe-core, fetched once."""
    name, version = AXE.rsplit("-", 1)
    folder = Path(pytestconfig.cache.mkdir("axe-core"))
    packed = folder / f"{AXE}.tgz"
    if not packed.is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm, which brings axe-core, is not installed")
        done = subprocess.run(
            [npm, "pack", f"{name}@{version}", "--pack-destination", folder, "--fetch-retries=0"],
            cwd=folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"axe-core cannot be fetched with npm: {done.stderr.strip()[-300:]}")
    content = packed.read_bytes()
    assert base64.b64encode(hashlib.sha512(content).digest()).decode() == AXE_SHA512
    with tarfile.open(packed) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.fixture(scope="module")
def pages(smoke_book) -> dict[str, Path]:
    root = smoke_book / "_build" / "html"
    found = {
        str(path.relative_to(root)): path
        for path in sorted(root.rglob("*.html"))
        # Report cards are no pages of the theme: tests/score looks at them. The first leads on.
        if not {"_static", "score"} & set(path.parts) and path != root / "index.html"
    }
    assert len(found) >= 20
    return found


def theme(chromium, name: str) -> None:
    """Let the reader's system ask for the light or the dark theme."""
    features = [{"name": "prefers-color-scheme", "value": name}]
    chromium("Emulation.setEmulatedMedia", features=features)


def width(chromium, pixels: int) -> None:
    chromium(
        "Emulation.setDeviceMetricsOverride",
        width=pixels, height=1000, deviceScaleFactor=1, mobile=pixels < 600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen(chromium, pages, request) -> dict[str, dict]:
    """What one visit to each page finds; with axe-core, also its violations in both themes."""
    try:
        script = request.getfixturevalue("axe")
    except pytest.skip.Exception:
        script = None
    found = {}
    for name, path in pages.items():
        chromium.problems.clear()
        theme(chromium, "light")
        width(chromium, 1400)
        chromium.open(path.as_uri())
        chromium.wait(DRAWN)
        chromium.value("scrollTo(0, 0)")
        one = found[name] = {
            "pictures": chromium.value(PICTURES),
            "headings": chromium.value(HEADINGS),
        }
        if script and not ALIKE.search(name):
            chromium.value(SHORTEN)
            chromium.value(script)
            one["light"] = violations(chromium)
            theme(chromium, "dark")
            chromium.wait("document.documentElement.dataset.theme === 'dark'")
            chromium.value("document.getAnimations().forEach(a => a.finish())")
            one["dark"] = violations(chromium, "color-contrast")
        width(chromium, 400)
        one["too wide"] = chromium.value(TOO_WIDE)
        one["problems"] = list(chromium.problems)
    return found


def violations(chromium, *rules: str) -> list[str]:
    """Serious violations of all rules of axe-core, or of some: rule, element, and what is wrong."""
    only = {"runOnly": {"type": "rule", "values": rules}} if rules else {}
    options = json.dumps({**only, "resultTypes": ["violations"], "preload": False})
    found = chromium.promised(f"axe.run(document, {options}).then(found => found.violations)")
    return [
        f"{violation['id']}: {node['target']}: {node['failureSummary']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_no_page_logs_an_error_or_asks_another_host(seen):
    assert {name: one["problems"] for name, one in seen.items() if one["problems"]} == {}


def test_every_picture_is_shown_and_described(seen):
    wrong = [
        (name, picture)
        for name, one in seen.items()
        for picture in one["pictures"]
        if not picture["alt"]
        or not picture["natural"]
        or (picture["shown"] and not picture["size"])
    ]
    assert wrong == []
    assert sum(len(one["pictures"]) for one in seen.values()) > 40


def test_no_page_shows_the_repr_of_an_object(pages):
    found = {}
    for name, path in pages.items():
        text = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        found[name] = REPR.findall(html.unescape(re.sub(r"<[^>]+>", "", text)))
    assert {name: shown for name, shown in found.items() if shown} == {}


def test_headings_come_in_order(seen):
    for name, one in seen.items():
        levels = [level for level, _ in one["headings"]]
        assert levels[:1] == [1] and levels.count(1) == 1, (name, one["headings"])
        steps = [after - before for before, after in zip(levels, levels[1:], strict=False)]
        assert max(steps, default=0) <= 1, (name, one["headings"])


def test_no_page_is_wider_than_a_phone(seen):
    assert {name: one["too wide"] for name, one in seen.items() if one["too wide"]} == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(seen, axe, theme):
    looked = {name: one[theme] for name, one in seen.items() if theme in one}
    assert len(looked) > 25
    assert {name: found for name, found in looked.items() if found} == {}
