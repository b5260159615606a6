"""Rollouts as JSON lines, of token ids and of text."""

import json
import math

from harness import Format, run
from mangling import as_json, mangled, mangled_bytes

from dentropy import PackedBatch

ROWS = [
    {"prompt_ids": [3, 4], "response_ids": [5, 1], "group": 0, "temperature": 1.0, "reward": 0.5},
    {"prompt_ids": [3, 4], "response_ids": [6, 7, 1], "group": 0, "temperature": 1.0, "reward": 1, "note": "x"},
    {"prompt_ids": [8], "completion_ids": [9], "group": 1, "temperature": 1.0, "reward": -2},
]
TEXT = [
    {"prompt": "17=", "response": "9+8", "score": 1.0},
    {"prompt": [{"role": "user", "content": "3="}], "response": "3", "score": 0.0},
    {"prompt": "3=", "response": "", "score": 0.0},
]


class Tokenizer:
    """One token a character; refuses what is beyond Latin, as small vocabularies do."""

    bos_token = bos_token_id = chat_template = None
    eos_token, eos_token_id = "\x01", 1
    all_special_tokens, added_tokens_decoder = ["\x01"], {}

    def encode(self, text, add_special_tokens):
        return list(text.encode("latin-1"))

    def decode(self, ids, **settings):
        return bytes(ids).decode("latin-1")

    def apply_chat_template(self, messages, add_generation_prompt, continue_final_message, return_dict):
        return self.encode("".join(message["content"] for message in messages), True)


def make(rows):
    def write(folder, random):
        path = folder / "rollouts.jsonl"
        if random.random() < 0.4:
            path.write_bytes(mangled_bytes(b"\n".join(map(as_json, rows)), random))
        else:
            changed = mangled(rows, random)
            lines = changed if isinstance(changed, list) else [changed]
            path.write_bytes(b"\n".join(map(as_json, lines)))
        return path

    return write


def read(path):
    return PackedBatch.from_jsonl(path, Tokenizer())


def number(value):
    return type(value) in (int, float) and abs(value) <= 1.7976931348623157e308


def tokens(row, ids, texts):
    """Of the first column there is; None where it holds what it may not."""
    for name in ids:
        if name in row:
            good = isinstance(row[name], list) and all(type(t) is int and 0 <= t < 2**63 for t in row[name])
            return row[name] if good else None
    for name in texts:
        if name in row:
            try:
                return list(row[name].encode("latin-1")) if isinstance(row[name], str) else chat(row[name], name)
            except (UnicodeError, TypeError, KeyError, AttributeError):
                return None
    return None


def chat(messages, name):
    if name not in ("prompt", "input") or not isinstance(messages, list):
        return None
    return list("".join(message["content"] for message in messages).encode("latin-1"))


def rows_of(data):
    """Rows of the format, or None: a file is UTF-8 with one JSON object on every line that is not blank."""
    data = data[3:] if data[:3] == b"\xef\xbb\xbf" else data
    try:
        lines = [line.decode("utf-8") for line in data.split(b"\n")]
        rows = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, RecursionError):
        return None
    return rows if rows and all(isinstance(row, dict) for row in rows) else None


def allowed(data):
    """By the docstring of from_jsonl, without dentropy."""
    rows = rows_of(data)
    if rows is None:
        return False
    prompts = [tokens(row, ("prompt_ids",), ("prompt", "input")) for row in rows]
    answers = [tokens(r, ("response_ids", "completion_ids"), ("response", "completion", "output")) for r in rows]
    if not all(prompts) or any(a is None for a in answers) or not any(answers):
        return False
    temperatures = [row.get("temperature", 1.0) for row in rows]
    if not all(number(t) and 1e-6 <= t <= 1e6 and t == temperatures[0] for t in temperatures):
        return False
    rewards = next((n for n in ("reward", "score", "advantage") if any(n in row for row in rows)), None)
    if rewards and not all(isinstance(row.get(rewards), bool) or number(row.get(rewards)) for row in rows):
        return False
    if any("group" in row for row in rows):
        labels = [row.get("group") for row in rows]
        return all(isinstance(x, str) or type(x) is int or (type(x) is float and math.isfinite(x)) for x in labels)
    return True


def forbidden(path, batch):
    if not allowed(path.read_bytes()):
        return f"the format forbids it: {path.read_bytes()[:300]!r}"
    rows = rows_of(path.read_bytes())
    prompts = [tokens(row, ("prompt_ids",), ("prompt", "input")) for row in rows]
    if [batch.prompt(i) for i in range(len(batch))] != prompts:
        return "its prompts are others"
    labels = [row.get("group", tuple(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    return None if batch.n_groups == len(set(labels)) else f"its groups are {len(set(labels))}, not {batch.n_groups}"


def permitted(path):
    return allowed(path.read_bytes())


def test_token_ids(folder):
    counts = run(Format(2000, make(ROWS), read, forbidden, permitted), folder)
    assert min(counts["read"], counts["refused"]) > 100


def test_text(folder):
    counts = run(Format(800, make(TEXT), read, forbidden, permitted), folder)
    assert min(counts["read"], counts["refused"]) > 40
