from report_page import content, page


def test_warnings_of_every_kind_are_listed_and_announced():
    run = content()
    run["audit"]["warnings"] = ["off policy"]
    run["slope"][0]["warnings"] = ["few groups"]
    run["curvature"]["warnings"] = ["one dominates"]
    run["measured"][1]["warnings"] = ["curved"]
    found = page(run)
    assert [e["text"] for e in found.all("li", within="audit")] == [
        "off policy", "causal slope: few groups", "curvature: one dominates", "ΔH at η = 5e-05: curved"
    ]  # fmt: skip
    (link,) = found.all("a")
    assert link["text"].startswith("4 warnings") and link["attrs"]["href"] == "#audit"
    assert not page().all("a") and "No warnings." in page().text


def test_rollouts_that_a_cap_cut_are_counted():
    run = content()
    for cut, said in ((0, False), (3, True), (run["audit"]["rollouts_expected"], False)):
        run["audit"]["rollouts_without_end"] = cut
        assert ("those of the process with this cut." in page(run).text) == said
