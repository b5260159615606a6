import pytest
from report_page import content

from dentropy.experiment.report.page import html
from dentropy.experiment.report.tags import Markup, tag


def test_what_cannot_be_encoded_is_shown_by_its_code():
    run = content()
    run["source"] = {"policy": "/data/\udcff"}  # an undecodable file name
    text = html(run, [])
    text.encode("utf-8")
    assert "/data/\\udcff" in text


def test_only_tags_make_markup():
    assert tag("p", "<b>", tag("i", "&"), None, ["a", "b"]) == "<p>&lt;b&gt;<i>&amp;</i>ab</p>"
    assert tag("p", Markup("<b>"), title='"') == '<p title="&quot;"><b></p>'
    with pytest.raises(TypeError, match="a child of a tag is int"):
        tag("p", 1)
