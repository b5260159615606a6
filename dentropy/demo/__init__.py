"""The embedded default: a small task with a checkable reward and the policy trained on it."""
