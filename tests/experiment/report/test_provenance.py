from report_page import content, page

from dentropy.experiment.summary import summary
from dentropy.experiment.warned import warned


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


def test_a_warning_is_above_the_answer_only_where_it_is_about_it():
    run = content()
    run["curvature"]["warnings"] = ["one dominates"]
    run["measured"][0]["warnings"] = run["slope"][1]["warnings"] = ["few groups"]
    found = page(run)
    (head,) = found.all("header")
    assert not [e for e in found.all("li") if head in e["inside"]]
    assert found.all("a")[0]["text"] == "2 warnings on other numbers"
    run["measured"][2]["warnings"] = ["few groups"]  # at the step itself
    run["audit"]["warnings"] = ["off policy"]
    found = page(run)
    (head,) = found.all("header")
    said = ["off policy", "ΔH at η = 0.0001: few groups"]
    assert [e["text"] for e in found.all("li") if head in e["inside"]] == said


def test_a_warning_that_a_run_repeats_is_said_once_with_its_count():
    run = content()
    for entry in [*run["slope"], *run["measured"]]:
        entry["warnings"] = ["few groups"]
    said = "few groups (7 times: causal slope, exact slope, mixed slope and 4 more)"
    assert warned(run) == [said]
    assert [e["text"] for e in page(run).all("li", within="audit")] == [said]
    assert summary(run).count("few groups") == 1 and said in summary(run)


def test_when_by_which_command_and_at_what_cost_it_was_made():
    run = content()
    run["provenance"].update(date="2026-01-02T03:04:05+00:00", command="dentropy probe --etas 1", seconds=1234.5)
    facts = page(run).all("dl", class_="facts")[0]["text"]
    for said in ("Begun2026-01-02T03:04:05+00:00", "Commanddentropy probe --etas 1", "1,234.5 s"):
        assert said in facts
    costs = run["provenance"]["forward_passes"]
    assert costs == {
        "forward": 6.0,
        "tangent": 3.0,
        "reverse": 3.0,
        "noise_floor": run["cost"]["noise_floor"] / run["n_tokens"],
    }
    assert sum(costs.values()) in page(run).values("provenance")
    del run["provenance"]
    assert "Begun" not in page(run).text


def test_rollouts_that_a_cap_cut_are_counted():
    run = content()
    for cut, said in ((0, False), (3, True), (run["audit"]["rollouts_expected"], False)):
        run["audit"]["rollouts_without_end"] = cut
        assert ("those of the process with this cut." in page(run).text) == said
