"""Command lines completed by what they need beside what a test is about; files are those of tests/cli/conftest.py."""

STEP = 1e-3
DIRECTION = "probe --direction v.safetensors"
# What a command gets where the case does not say otherwise. All paths are relative to `place`.
DEFAULTS = {
    "probe": {"--policy": "before", "--rollouts": "rollouts.jsonl", "--out": "new"},
    "sample": {"--policy": "before", "--prompts": "prompts.jsonl", "--out": "new"},
}


def completed(text):
    words = text.split()
    defaults = DEFAULTS.get(words[0] if words else None, {})
    return [*words, *(part for pair in defaults.items() if pair[0] not in words for part in pair)]
