from report_page import page, rollouts

from dentropy.experiment.report.rollouts import SHOWN_TOKENS


def test_tokens_are_all_there_in_order_with_their_numbers():
    found = page()
    first = next(iter(found.all("p", class_="tokens")))
    tokens = [e for e in found.all("span", class_="token") if first in e["inside"]]
    assert [e["text"] for e in tokens] == ["12", "+⏎\n", " 5", "<|eos|>"]
    assert [e["attrs"]["class"] for e in tokens] == ["token raises-4", "token lowers-1", "token", "token raises-2"]
    said = [e["attrs"]["title"] for e in tokens]
    assert said[0] == "0.0400 (10⁻³ nats per token)" and said[1] == "−0.0100 (10⁻³ nats per token)"


def test_what_was_given_between_generated_tokens_is_shown_and_has_no_number():
    tokens = [["1", 0.4], ["tool: 7", None], ["7", -0.1]]
    found = page(shown=[rollouts()[0] | {"tokens": tokens, "contribution": 0.3}])
    (text,) = found.all("p", class_="tokens")
    assert text["text"] == "1tool: 77"
    (given,) = found.all("span", class_="given")
    assert given["text"] == "tool: 7" and given["attrs"]["title"] == "given, not generated"
    assert [e["text"] for e in found.all("code") if any(t["tag"] == "table" for t in e["inside"])][:2] == ["1", "7"]


def test_a_long_rollout_is_cut_and_says_by_how_much():
    tokens = [["a", 0.001]] * SHOWN_TOKENS + [["z", 0.2], ["z", 0.3]]
    total = sum(value for _, value in tokens)
    found = page(shown=[rollouts()[0] | {"tokens": tokens, "contribution": total}])
    (text,) = found.all("p", class_="tokens")
    assert text["text"] == "a" * SHOWN_TOKENS
    assert "… and 2 more tokens, together 0.0500 (10⁻³ nats per token)" in found.text
