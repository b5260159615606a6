from report_page import content, page


def test_missing_numbers_are_dashes_and_question_marks_with_their_reason():
    run = content()
    run["measured"][3].update(delta=None, stderr=None, interval=None, smoothed_delta=None)
    run["not_finite"] = {"measured.3.delta": "inf"}
    run["slope"][2].update(stderr=None, interval=None, stderr_reason="there is one group")
    found = page(run)
    assert "measured.3.delta is inf" in found.all("ul", class_="warnings")[0]["text"]
    assert "there is one group" in found.text
    assert any(e["text"].endswith("± ?") for e in found.all("td", within="slope"))
