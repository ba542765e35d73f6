"""The frame of all pages: what it is given stands in it, as text and once."""

from __future__ import annotations

from elastic_lm.monitor.frame import framed


def test_title_and_kind_stand_in_the_frame_as_text() -> None:
    page = framed("<a>", "loss <= 3", ["<p>one</p>", "<p>two</p>"])
    assert "<title>&lt;a&gt; · elastic-lm</title>" in page
    assert "<h1>&lt;a&gt;<small>loss &lt;= 3</small></h1>\n<p>one</p>\n<p>two</p>\n<script>" in page


def test_what_looks_like_a_slot_is_text() -> None:
    assert "<h1>{{body}}<small>{{title}}</small></h1>\n{{kind}}\n" in framed("{{body}}", "{{title}}", ["{{kind}}"])
