"""What every fragment of HTML has to be: well formed, described, and from no other host."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Strict(HTMLParser):
    """Refuses elements that are left open or closed out of order."""

    void = {"img", "input", "meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute is repeated in <{tag}>"
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def stands_alone(fragment: str) -> None:
    """Fail where HTML is not well formed, pictures are not described, or another host is asked."""
    tags = Strict(fragment).attributes
    for tag, attributes in tags:
        address = attributes.get("src") or attributes.get("href") or ""
        assert not re.match(r"(?:https?:)?//", address)
        if tag == "img":
            assert attributes["alt"]
        if tag == "button":
            assert attributes["type"] == "button"
    script = re.sub(r"http://www\.w3\.org/2000/svg", "", fragment)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|getImageData|import ", script)
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
