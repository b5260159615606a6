"""What the README shows, to run: `python -m dentropy.examples.grpo` trains with TRL and records the entropy."""
