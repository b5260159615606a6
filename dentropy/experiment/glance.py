"""A run at a glance, from the content of results.json: its rollouts in a line, its changes in a table."""

from __future__ import annotations

from dentropy.shown import count, html_table, number


def rollouts_text(n_sequences: int, n_groups: int, n_tokens: int, dtype: str, device: str) -> str:
    """How many rollouts, prompts and tokens, in which precision and where.

    Example:
        >>> rollouts_text(32, 1, 4096, "float32", "cpu")
        '32 rollouts of 1 prompt, 4,096 tokens, float32 on cpu'
    """
    sizes = count(n_sequences, "rollout"), count(n_groups, "prompt"), count(n_tokens, "token")
    return "{} of {}, {}, ".format(*sizes) + f"{dtype} on {device}"


def rollouts_of(content: dict) -> str:
    """The same, of a run."""
    return rollouts_text(*(content[name] for name in ("n_sequences", "n_groups", "n_tokens", "dtype", "device")))


def changes_table(content: dict) -> str:
    """Prediction and measurement at every η, as HTML."""
    rows = [
        (
            f"{entry['eta']:g}",
            number(entry["predicted_linear"], entry["predicted_linear_stderr"]),
            number(entry["delta"], entry["stderr"]),
            "?" if entry["ess_fraction"] is None else f"{entry['ess_fraction']:.1%}",
            entry["verdict"],
        )
        for entry in content["measured"]
    ]
    entropy = number(content["base_entropy"], content["base_entropy_stderr"])
    caption = f"Change of the entropy in nats per token, {entropy} before: {rollouts_of(content)}"
    return html_table(caption, ("η", "predicted ± SE", "measured ± SE", "ESS", "verdict"), rows)
