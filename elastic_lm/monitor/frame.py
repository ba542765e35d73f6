"""What all pages have in common: their style and script, around sections that differ."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from importlib import resources


def framed(title: str, kind: str, sections: Iterable[str]) -> str:
    """A page that needs no other file. `kind`: what it is about, told beside its title. Sections are HTML already."""
    slots = {"title": html.escape(title), "kind": html.escape(kind), "body": "\n".join(sections)}
    page = resources.files("elastic_lm.monitor").joinpath("report.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], page)  # at once: what fills a slot may look like one
