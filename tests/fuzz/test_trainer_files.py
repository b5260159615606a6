"""Rollouts as trainers write them: mangled, each is refused in one line or read as what it then says."""

import io
import json
import shutil

import pyarrow.parquet
import pytest
import torch
import trainer_files as files
from harness import Format, run
from mangling import as_json, mangled, mangled_bytes
from test_json_lines import Tokenizer, number, rows_of

from dentropy import read_rollouts


def token_ids(ids):
    assert isinstance(ids, list) and all(type(t) is int and 0 <= t < 2**63 for t in ids)
    return ids


def flags(values, n):
    assert isinstance(values, list) and len(values) == n
    assert all(isinstance(v, (bool, int, float)) and v in (0, 1) for v in values)
    return [bool(v) for v in values]


def at(values, kept):
    assert isinstance(values, list) and len(values) == len(kept)
    found = [v for v, keep in zip(values, kept) if keep]
    assert all(map(number, found))
    return found


def encoded(text):
    assert isinstance(text, str)
    return list(text.encode("latin-1"))


def turn(prompt, response):
    return [*prompt, *response], [False] * len(prompt) + [True] * len(response)


def trl(row):
    return dict(rollout=turn(encoded(row["prompt"]), encoded(row["completion"])), advantage=row["advantage"])


def trl_chat(row):
    """Text may stand in place of messages."""
    prompt, answer = row["prompt"], row["completion"]
    if not isinstance(prompt, str):
        prompt = "".join(message["content"] for message in prompt)
    if not isinstance(answer, str):
        (message,) = answer
        assert message["role"] == "assistant" and not any(v for k, v in message.items() if k not in ("role", "content"))
        answer = message["content"]
    return dict(rollout=turn(encoded(prompt), encoded(answer)), advantage=row["advantage"])


def verl(row):
    group = row["uid"].rsplit("_", 2)[0] if "uid" in row else None
    return dict(rollout=turn(encoded(row["input"]), encoded(row["output"])), reward=row["score"], group=group)


def prime_rl(row):
    kept = flags(row["loss_mask"], len(token_ids(row["token_ids"])))
    logp = at(row["inference_logprobs"], kept)
    return dict(rollout=(row["token_ids"], kept), logp=logp, step=row.get("export_step", row.get("step")))


def nemo_rl(row):
    row = {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in row.items()}
    n = row["input_lengths"]
    assert type(n) is int and 0 <= n <= len(token_ids(row["token_ids"]))
    kept = flags(row["token_loss_mask"], len(row["token_ids"]))[:n]
    return dict(rollout=(row["token_ids"][:n], kept), reward=row.get("rewards"), step=None)


def open_instruct(row):
    rollout = turn(token_ids(row["prompt_tokens"]), token_ids(row["response_tokens"]))
    return dict(rollout=rollout, reward=row.get("reward"), group=row["prompt_idx"], advantage=row.get("advantage"))


def areal(row):
    assert row["head_version"] == row["tail_version"]
    rollout = turn(encoded(row["prompt"]), encoded(row["completion"]))
    return dict(rollout=rollout, reward=row.get("reward"), group=row["task_id"], step=row["tail_version"])


def slime(row):
    ids, n = token_ids(row["tokens"]), row["response_length"]
    assert type(n) is int and 0 <= n <= len(ids)
    mask = [True] * n if row.get("loss_mask") is None else flags(row["loss_mask"], n)
    reward = row.get("reward")
    reward = next(iter(reward.values())) if isinstance(reward, dict) and len(reward) == 1 else reward
    return dict(rollout=(ids, [False] * (len(ids) - n) + mask), reward=reward, group=row.get("group_index"), step=None)


def conversation(row):
    *given, answer = row["messages"]
    assert given and answer["role"] == "assistant"
    rollout = turn(encoded("".join(message["content"] for message in given)), encoded(answer["content"]))
    return dict(rollout=rollout, reward=row.get("reward"), group=row.get("group"), step=None)


def saved(data):
    """What a file says, by the libraries alone."""
    if data[:4] == b"PAR1":
        return pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    if data[:2] == b"PK":
        return torch.load(io.BytesIO(data), weights_only=True)["samples"]
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        return json.loads(data.decode("utf-8-sig"))
    return rows_of(data)


def differs(batch, rows, found):
    """In what the batch is not what the rows say."""
    for i, one in enumerate(found):
        ids, kept = one["rollout"]
        end = max((j + 1 for j, keep in enumerate(kept) if keep), default=len(ids))
        if batch.row(i) != (ids[:end], kept[:end]):
            return f"row {i} is {ids[:end]}, {kept[:end]}, not {batch.row(i)}"
    for name, column in (("reward", batch.reward), ("advantage", batch.advantage)):
        said = [one.get(name) for one in found]
        if column is not None and name in found[0] and [*column] != said:
            return f"{name} is {said}, not {column}"
    if len({one.get("step", row.get("step")) for one, row in zip(found, rows)}) != 1:
        return "its steps are several"
    if "logp" in found[0] and batch.sampler_logp.tolist() != [float(p) for one in found for p in one["logp"]]:
        return "its log-probabilities are others"
    labels = [one.get("group") for one in found]
    if labels[0] is not None and batch.n_groups != len(set(labels)):
        return f"its groups are {labels}"
    return None


def forbidden(columns, says):
    def why(path, batch):
        try:
            rows = saved(path.read_bytes())
            if not all(name in rows[0] for name in columns):
                return None  # of another format then, which has its own test
            found = [says(row) for row in rows]
        except Exception as error:
            return f"the format forbids it ({error!r:.100}): {path.read_bytes()[:200]!r}"
        return differs(batch, rows, found)

    return why


def as_parquet(path, rows):
    """A JSON array where one column has values of several kinds, which Parquet has not."""
    try:
        return files.as_parquet(path, rows)
    except (pyarrow.ArrowException, TypeError, OverflowError, AttributeError, UnicodeError, ValueError):
        path.write_bytes(as_json(rows))
        return path


def as_lines(path, rows):
    path.write_bytes(b"\n".join(map(as_json, rows)))
    return path


def as_array(path, rows):
    path.write_bytes(as_json(rows))
    return path


# Format: (the columns that tell it, what a row says, its rows, the writer).
FORMATS = {
    "trl": (("step", "prompt", "completion", "advantage"), trl, files.trl(), as_lines),
    "trl parquet": (("step", "prompt", "completion", "advantage"), trl, files.trl(), as_parquet),
    "trl chat": (("step", "prompt", "completion", "advantage"), trl_chat, files.trl_chat(), as_parquet),
    "verl": (("input", "output", "score", "step"), verl, files.verl(), as_lines),
    "prime-rl": (("token_ids", "loss_mask", "inference_logprobs"), prime_rl, files.prime_rl(), as_lines),
    "nemo-rl": (("token_ids", "token_loss_mask", "input_lengths"), nemo_rl, files.nemo_rl(), as_lines),
    "open-instruct": (
        ("prompt_tokens", "response_tokens", "prompt_idx"),
        open_instruct,
        files.open_instruct(),
        as_lines,
    ),
    "areal": (("prompt", "completion", "task_id", "head_version", "tail_version"), areal, files.areal(), as_lines),
    "slime": (("tokens", "response_length"), slime, files.slime(), files.as_saved),
    "messages": (("messages",), conversation, files.messages(), as_lines),
    "array": (("messages",), conversation, files.messages(), as_array),
}


def make(rows, write):
    def one(folder, random):
        path = folder / "rollouts"
        if random.random() < 0.3:
            write(path, rows)
            path.write_bytes(mangled_bytes(path.read_bytes(), random))
        else:
            changed = mangled(rows, random)
            write(path, changed if isinstance(changed, list) else [changed])
        return path

    return one


def read(path):
    return read_rollouts(path, Tokenizer(), temperature=1.0)


def in_folder(folder, random):
    """Ranks of a prime-rl step, some of their files mangled, missing or beside others."""
    path = folder / "step_7"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name in ("rank_0.jsonl", "rank_1.jsonl", "STABLE", "notes.txt", "rank_2.parquet", "sub/rank_3.jsonl"):
        if random.random() < 0.7 - 0.5 * (name[-5] in "q/3"):
            (path / name).parent.mkdir(exist_ok=True)
            rows = mangled(files.prime_rl(), random) if random.random() < 0.2 else files.prime_rl()
            as_lines(path / name, rows if isinstance(rows, list) else [rows])
    return path


def whole(path, batch):
    try:
        ranks = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
        rows = [row for file in ranks for row in rows_of(file.read_bytes())]
        return differs(batch, rows, [prime_rl(row) for row in rows])
    except Exception as error:
        return f"the format forbids it ({error!r:.100})"


def fuzz(name, count, folder):
    columns, says, rows, write = FORMATS[name]
    counts = run(Format(count, make(rows, write), read, forbidden(columns, says)), folder)
    assert min(counts["read"], counts["refused"]) > count / 50


@pytest.mark.parametrize("name", FORMATS)
def test_files(folder, name):
    fuzz(name, 150, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_files(folder, name):
    fuzz(name, 10_000, folder)


def test_folders(folder):
    counts = run(Format(100, in_folder, read, whole), folder)
    assert min(counts["read"], counts["refused"]) > 5
