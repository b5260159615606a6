"""Rollouts as JSON lines, of token ids and of text."""

import json
import math

import pytest
from harness import Format, run
from mangling import as_json, mangled, mangled_bytes

from dentropy import PackedBatch

ROWS = [
    {"prompt_ids": [3, 4], "response_ids": [5, 1], "group": 0, "temperature": 1.0, "reward": 0.5},
    {"prompt_ids": [3, 4], "response_ids": [6, 7, 1], "group": 0, "temperature": 1.0, "reward": 1, "note": "x"},
    {"prompt_ids": [8], "completion_ids": [9], "group": 1, "temperature": 1.0, "reward": -2},
]
MASKED = [
    {"token_ids": [3, 4, 5, 6, 1], "loss_mask": [0, 1, 0, 0, 1], "advantage": [0.5, -1], "sampler_logp": [-0.5, 0.0]},
    {"token_ids": [3, 5, 1, 9], "loss_mask": [0, 1, 1, 0], "advantage": [2, 0.0], "sampler_logp": [-3, -0.1]},
    {"prompt_ids": [8], "response_ids": [9], "temperature": 0.7, "advantage": [1], "sampler_logp": [-2]},
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


def masked(row):
    """(tokens, mask) of a row with a mask; None where it holds what it may not."""
    ids, mask = tokens(row, ("token_ids",), ()), row["loss_mask"]
    if not ids or not isinstance(mask, list) or len(mask) != len(ids):
        return None
    return (ids, mask) if all(type(x) in (bool, int, float) and x in (0, 1) for x in mask) and not mask[0] else None


def parts(row):
    """(what comes before the first generated token, the generated tokens), either None where it is not allowed."""
    if not ("token_ids" in row and "loss_mask" in row):
        prompt = tokens(row, ("prompt_ids",), ("prompt", "input"))
        return prompt, tokens(row, ("response_ids", "completion_ids"), ("response", "completion", "output"))
    if masked(row) is None:
        return None, None
    ids, mask = masked(row)
    first = mask.index(1) if 1 in mask else len(ids)
    return ids[:first], [token for token, flag in zip(ids, mask, strict=True) if flag]


def for_each_token(rows, name, answers):
    """Whether all lines have as many numbers in a column as generated tokens."""
    values = [row.get(name) for row in rows]
    if not all(isinstance(x, list) and len(x) == len(a) for x, a in zip(values, answers, strict=True)):
        return False
    return all(number(x) for line in values for x in line)


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
    prompts, answers = zip(*map(parts, rows), strict=True)
    if not all(prompts) or any(a is None for a in answers) or not any(answers):
        return False
    if not all(number(t) and 1e-6 <= t <= 1e6 for t in (row.get("temperature", 1.0) for row in rows)):
        return False
    rewards = next((n for n in ("reward", "score") if any(n in row for row in rows)), None)
    if rewards and not all(isinstance(row.get(rewards), bool) or number(row.get(rewards)) for row in rows):
        return False
    if any("advantage" in row for row in rows) and not all(number(row.get("advantage")) for row in rows):
        as_many = sum(map(len, answers)) == len(rows) and not all(len(a) == 1 for a in answers)
        if as_many or not for_each_token(rows, "advantage", answers):
            return False
    if any("sampler_logp" in row for row in rows):
        if not for_each_token(rows, "sampler_logp", answers):
            return False
        if not all(x <= 1e-3 for row in rows for x in row["sampler_logp"]):
            return False
    if any("group" in row for row in rows):
        labels = [row.get("group") for row in rows]
        return all(isinstance(x, str) or type(x) is int or (type(x) is float and math.isfinite(x)) for x in labels)
    return True


def forbidden(path, batch):
    if not allowed(path.read_bytes()):
        return f"the format forbids it: {path.read_bytes()[:300]!r}"
    rows = rows_of(path.read_bytes())
    prompts, answers = map(list, zip(*map(parts, rows), strict=True))
    if [batch.response(i) for i in range(len(batch))] != answers:
        return "its generated tokens are others"
    if [batch.prompt(i) for i in range(len(batch))] != prompts:
        return "its prompts are others"
    labels = [row.get("group", tuple(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    return None if batch.n_groups == len(set(labels)) else f"its groups are {len(set(labels))}, not {batch.n_groups}"


def permitted(path):
    return allowed(path.read_bytes())


def fuzz(rows, count, folder):
    counts = run(Format(count, make(rows), read, forbidden, permitted), folder)
    assert min(counts["read"], counts["refused"]) > count / 20


@pytest.mark.parametrize("rows, count", [(ROWS, 800), (MASKED, 600), (TEXT, 400)], ids=["token ids", "masked", "text"])
def test_files(folder, rows, count):
    fuzz(rows, count, folder)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ROWS, MASKED, TEXT], ids=["token ids", "masked", "text"])
def test_many_files(folder, rows):
    fuzz(rows, 10_000, folder)
