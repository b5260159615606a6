import warnings
from pathlib import Path

import numpy as np
import pytest
import trainer_files as files
from letter_files import TURNS as TEMPLATE
from letter_files import ids, letters
from trainer_files import ROLLOUTS, STEP, TURNS

from dentropy import PackedBatch, read_rollouts
from dentropy.demo.run import load_tokenizer

LOG = Path(__file__).parent / "files" / "completions_00003.parquet"
TEXT = dict(tokenizer=letters(), append_eos=True, max_new_tokens=9)
# Format: (the columns it is known by the name of, the rollouts, the writer of rows, its rows, how it is read).
FORMATS = {
    "trl": ("TRL", TURNS, files.as_json_lines, files.trl(), TEXT),
    "trl parquet": ("TRL", TURNS, files.as_parquet, files.trl(), TEXT),
    "trl array": ("TRL", TURNS, files.as_array, files.trl(), TEXT),
    "verl": ("verl", TURNS, files.as_json_lines, files.verl(), TEXT),
    "prime-rl": ("prime-rl", ROLLOUTS, files.as_json_lines, files.prime_rl(), {}),
    "nemo-rl": ("NeMo-RL", ROLLOUTS, files.as_json_lines, files.nemo_rl(), {}),
    "open-instruct": ("open-instruct", TURNS, files.as_json_lines, files.open_instruct(), {}),
    "areal": ("AReaL", TURNS, files.as_json_lines, files.areal(), dict(tokenizer=letters())),
    "slime": ("slime", ROLLOUTS, files.as_saved, files.slime(), {}),
}


def read(path, **arguments):
    """The batch, what was said to be recognized, and the warnings."""
    said = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        batch = read_rollouts(path, say=said.append, **({"temperature": 0.7} | arguments))
    return batch, said, [str(warning.message) for warning in warned]


def per_token(batch):
    """Advantages of all generated tokens."""
    per_rollout = len(batch.advantage) == len(batch)
    return (np.repeat(batch.advantage, batch.response_lens) if per_rollout else batch.advantage).tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_gives_back_the_rollouts_it_was_made_of(tmp_path, name):
    trainer, rollouts, write, rows, arguments = FORMATS[name]
    path = write(tmp_path / "unnamed", rows)
    batch, said, warned = read(path, **arguments)
    assert [batch.row(i) for i in range(len(batch))] == [(r.tokens, [bool(g) for g in r.generated]) for r in rollouts]
    _, numbers = np.unique([r.group for r in rollouts], return_inverse=True)
    assert np.unique(batch.group, return_inverse=True)[1].tolist() == numbers.tolist()
    assert batch.reward.tolist() == [r.reward for r in rollouts] and batch.temperature == 0.7 and warned == []
    if name not in ("verl", "areal", "slime"):
        assert per_token(batch) == [a for r in rollouts for a in r.advantage]
    if name in ("prime-rl", "nemo-rl", "open-instruct", "slime"):
        assert batch.sampler_logp.tolist() == [p for r in rollouts for p in r.logp]
    step = "" if name == "nemo-rl" else f", step {STEP}"
    assert len(said) == 1 and trainer in said[0] and said[0].endswith(f"({len(rollouts)} rows{step})")


def test_a_log_that_trl_wrote():
    """Its 64 rows are 8 answers each to 8 prompts; GRPO's advantages sum to zero over the answers to one."""
    batch, said, _ = read(LOG, tokenizer=load_tokenizer(), append_eos=True, max_new_tokens=16)
    assert len(batch) == 64 and "a completions log of TRL (64 rows, step 3)" in said[0]
    assert load_tokenizer().decode(batch.response(1)[:-1]) == "22*3+9+9+1" and batch.reward[:3].tolist() == [1, 0, 0]
    assert np.abs(batch.advantage.reshape(8, 8).sum(1)).max() < 1e-5 and np.ptp(batch.advantage) > 1
    assert all((batch.group.reshape(8, 8) == batch.group.reshape(8, 8)[:, :1]).ravel())


def test_chat_messages_go_through_the_template(tmp_path):
    tokenizer = letters(template=TEMPLATE, extra=["<turn>", "<user>"])
    chats = {"trl": files.as_parquet(tmp_path / "a", files.trl_chat()), "own": tmp_path / "b"}
    files.as_json_lines(chats["own"], files.messages())
    for path in chats.values():
        batch, _, warned = read(path, tokenizer=tokenizer, append_eos=True, end_tokens=[3], max_new_tokens=9)
        assert batch.prompt(0) == [4, *ids("ab"), 3, 4] and batch.response(0) == [*ids("cd"), 3] and warned == []
        assert batch.reward.tolist() == [r.reward for r in TURNS]


def test_keys_that_parquet_adds_to_messages_are_left_out(tmp_path):
    """A template that writes every key of a message would see those of the others."""
    template = "{% for m in messages %}{% for key in m %}<user>{{ m.content }}{% endfor %}{% endfor %}"
    rows = files.trl_chat()
    rows[2]["prompt"][0]["name"] = "a"
    tokenizer = letters(template=template, extra=["<user>"])
    parquet, lines = (
        read(write(tmp_path / write.__name__, rows), tokenizer=tokenizer)[0]
        for write in (files.as_parquet, files.as_json_lines)
    )
    assert parquet.tokens.tolist() == lines.tokens.tolist() and parquet.prompt_lens.tolist() == [6, 6, 6]


def test_earlier_messages_of_the_assistant_are_said_to_be_given(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}
    tokenizer = letters(template=TEMPLATE, extra=["<turn>", "<user>"], eos_token="<turn>")
    batch, _, warned = read(files.as_json_lines(tmp_path / "m", [row]), tokenizer=tokenizer, append_eos=True)
    assert batch.response(0) == [*ids("b"), 3] and "1 of 1 conversations have earlier messages" in warned[0]


REWARDED = [row | {"format": 0.25, "correct": True} for row in files.trl()]


class TestRewards:
    def test_several_are_a_choice(self, tmp_path):
        path = files.as_parquet(tmp_path / "t", REWARDED)
        with pytest.raises(ValueError, match=r"row 1: reward: any of 'accuracy', 'format', 'correct', expected a choi"):
            read(path, **TEXT)
        for name, expected in (("format", [0.25] * 3), ("correct", [1.0] * 3), ("accuracy", [1.0, 0.0, 0.5])):
            assert read(path, reward=name, **TEXT)[0].reward.tolist() == expected
        for name in ("advantage", "step", "answer", "nothing"):
            with pytest.raises(ValueError, match=f"reward: '{name}' is no column of numbers .* one of 'accuracy', 'fo"):
                read(path, reward=name, **TEXT)

    def test_another_than_the_usual_one(self, tmp_path):
        path = files.as_json_lines(tmp_path / "v", files.verl())
        assert read(path, reward="acc", **TEXT)[0].reward.tolist() == [1.0, 0.0, 0.0]
        row = {"prompt_ids": [5], "response_ids": [7], "reward": 1.0, "other": 3.0}
        assert read(files.as_json_lines(tmp_path / "o", [row]), reward="other")[0].reward.tolist() == [3.0]

    def test_a_dictionary_of_slime(self, tmp_path):
        samples = [sample | {"reward": {"math": sample["reward"], "style": 2.0}} for sample in files.slime()]
        path = files.as_saved(tmp_path / "s.pt", samples)
        with pytest.raises(ValueError, match="sample 1: reward: any of 'math', 'style'"):
            read(path)
        assert read(path, reward="math")[0].reward.tolist() == [r.reward for r in ROLLOUTS]

    def test_a_gap_is_an_error(self, tmp_path):
        rows = files.trl()
        rows[1]["accuracy"] = float("nan")
        with pytest.raises(ValueError, match="row 2: reward: nan, expected a finite number"):
            read(files.as_parquet(tmp_path / "t", rows), **TEXT)


class TestTemperature:
    def test_it_is_asked_for(self, tmp_path):
        for name, (_, _, write, rows, arguments) in FORMATS.items():
            path = write(tmp_path / "file", rows)
            with pytest.raises(
                ValueError, match=r"1: no temperature, which .* does not hold, expected .*--temperature"
            ):
                read(path, temperature=None, **arguments), name

    def test_that_of_the_rows_stands(self, tmp_path):
        rows = [{"prompt_ids": [5], "response_ids": [7, 2]}] * 2
        path = files.as_json_lines(tmp_path / "o", rows)
        assert read(path, temperature=None)[0].temperature == 1.0 and read(path)[0].temperature == 0.7
        files.as_json_lines(path, [rows[0] | {"temperature": t} for t in (0.7, 0.5)])
        assert read(path, temperature=None)[0].temperatures.tolist() == [0.7, 0.5]
        with pytest.raises(ValueError, match=r"line 2: temperature: 0\.5, expected that asked for, 0\.7"):
            read(path)


@pytest.mark.parametrize("settings", [{"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_rollouts_that_were_cut_are_refused(tmp_path, settings):
    row = {"prompt_ids": [5], "response_ids": [7], "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    assert len(read(files.as_json_lines(tmp_path / "a", [row]))[0]) == 1
    for cut in (row | settings, row | {"sampling_params": settings}):
        with pytest.raises(ValueError, match=f"line 2: {next(iter(settings))}: .*of another distribution"):
            read(files.as_json_lines(tmp_path / "a", [row, cut]))


class TestLostTemplate:
    """Between the special tokens the template writes a for the user, b for the assistant, c for the system."""

    tokenizer = letters(
        template="{% for m in messages %}<user>{{ {'user': 'a', 'assistant': 'b', 'system': 'c'}[m.role] }}"
        "{{ m.content }}<turn>{% endfor %}{{ '<user>b' if add_generation_prompt }}",
        extra=["<user>", "<turn>"],
        eos_token="<turn>",
    )

    def read(self, tmp_path, text, tokenizer=None):
        row = files.verl()[0] | {"input": text, "output": "c"}
        path = files.as_json_lines(tmp_path / "v", [files.verl()[0] | {"input": "adb"}, row])
        return read(path, tokenizer=tokenizer or self.tokenizer, append_eos=True, max_new_tokens=9)

    @pytest.mark.parametrize(
        "roles, contents",
        [
            (["user"], ["d"]),
            (["user"], [""]),
            (["user"], ["dbdb"]),
            (["system", "user"], ["e", "d"]),
            (["system", "user"], ["e", "db"]),
        ],
    )
    def test_a_prompt_is_rebuilt(self, tmp_path, roles, contents):
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        tokens = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        batch, _, warned = self.read(tmp_path, self.tokenizer.decode(tokens, skip_special_tokens=True))
        assert batch.prompt(1) == tokens and batch.response(1) == [*ids("c"), 3]
        assert len(warned) == 1 and "lost the chat template's tokens; 2 of 2 prompts were rebuilt" in warned[0]

    @pytest.mark.parametrize(
        "text, found", [("d", "no"), ("adba", "no"), ("adbeafb", "2"), ("ceadadb", "2"), ("ceadbfagb", "3")]
    )
    def test_a_text_of_no_or_several_conversations_is_refused(self, tmp_path, text, found):
        with pytest.raises(ValueError, match=f"line 2: input: the chat template's tokens are lost, and {found} conv"):
            self.read(tmp_path, text)

    def test_without_names_of_roles_it_is_one_message(self, tmp_path):
        tokenizer = letters(template=TEMPLATE, extra=["<turn>", "<user>"], eos_token="<turn>")
        assert self.read(tmp_path, "dd", tokenizer)[0].prompt(1) == [4, *ids("dd"), 3, 4]

    def test_a_tokenizer_without_a_template_loses_none(self, tmp_path):
        for tokenizer in (letters(), letters(template="{{ messages[0].content }}")):
            batch, _, warned = self.read(tmp_path, "ab", tokenizer)
            assert batch.prompt(1) == ids("ab") and warned == []


class TestFolders:
    @pytest.mark.parametrize("within", ["", "completions"])
    def test_a_step_of_a_run(self, tmp_path, within):
        """As TRL leaves it, among checkpoints; 10 comes behind 9."""
        place = tmp_path / "run" / within
        place.mkdir(parents=True)
        for step in (10, 9):
            files.as_parquet(place / f"completions_{step:05d}.parquet", [row | {"step": step} for row in files.trl()])
        with pytest.raises(ValueError, match="2 steps .*choose one: completions_00009.parquet, completions_00010"):
            read(tmp_path / "run", **TEXT)
        for step in (9, 10):
            assert read(tmp_path / "run", step=step, **TEXT)[1][0].endswith(f"(3 rows, step {step})")
        with pytest.raises(ValueError, match="choose one"):
            read(tmp_path / "run", step=11, **TEXT)

    def test_ranks_of_a_step_are_put_together_in_order(self, tmp_path):
        for rank in (10, 9):
            rows = [row | {"rank": rank} for row in files.prime_rl([ROLLOUTS[rank - 9]])]
            for step in (STEP, STEP + 1):
                place = tmp_path / "run" / "token_exports" / f"step_{step}"
                place.mkdir(parents=True, exist_ok=True)
                (place / "STABLE").touch()
                files.as_json_lines(place / f"rank_{rank}.jsonl", [row | {"export_step": step} for row in rows])
        batch, _, _ = read(tmp_path / "run", step=STEP)
        assert [batch.row(i)[0] for i in (0, 1)] == [ROLLOUTS[0].tokens, ROLLOUTS[1].tokens]
        with pytest.raises(ValueError, match="2 steps .*choose one: step_7, step_8"):
            read(tmp_path / "run")
        (place / "STABLE").unlink()
        with pytest.raises(ValueError, match="no file STABLE"):
            read(place)

    def test_tasks_of_a_version(self, tmp_path):
        place = tmp_path / "rollout" / str(STEP)
        place.mkdir(parents=True)
        for i, row in enumerate(files.areal()):
            files.as_json_lines(place / f"{i}.jsonl", [row])
        batch, said, _ = read(tmp_path, tokenizer=letters())
        assert len(batch) == 3 and batch.n_groups == 2 and "rollouts of AReaL (3 rows, step 7)" in said[0]
        files.as_json_lines(place / "3.jsonl", files.open_instruct())
        with pytest.raises(ValueError, match="3.jsonl: rollouts of open-instruct, expected rollouts of AReaL as in 0"):
            read(tmp_path, tokenizer=letters())

    def test_steps_within_shards(self, tmp_path):
        later = [row | {"step": STEP + 1} for row in files.open_instruct()]
        for shard, rows in enumerate((files.open_instruct() + later[:1], later[1:])):
            files.as_json_lines(tmp_path / f"run_rollouts_{shard:06d}.jsonl", rows)
        files.as_json_lines(tmp_path / "run_metadata.jsonl", [{"run": "run"}])
        with pytest.raises(ValueError, match=r"rows of 2 steps.*choose one \(step=, --step\): 7, 8"):
            read(tmp_path)
        batch, said, _ = read(tmp_path, step=STEP + 1)
        assert len(batch) == 3 and said[0].endswith("(3 rows, step 8)")
        with pytest.raises(ValueError, match="step: 6 is not in .*, expected one of 7, 8"):
            read(tmp_path, step=6)

    def test_a_step_that_only_a_name_tells(self, tmp_path):
        path = files.as_json_lines(tmp_path / "train_data_step3.jsonl", files.nemo_rl())
        assert len(read(path, step=3)[0]) == len(read(tmp_path, step=3)[0]) == 3
        with pytest.raises(ValueError, match="step: 4, but .* does not say"):
            read(path, step=4)

    def test_files_of_an_unknown_order(self, tmp_path):
        for name in "ab":
            files.as_json_lines(tmp_path / f"{name}.jsonl", files.messages())
        with pytest.raises(ValueError, match="choose one: a.jsonl, b.jsonl"):
            read(tmp_path, **TEXT)

    def test_a_folder_without_rollouts(self, tmp_path):
        with pytest.raises(ValueError, match="a folder without .jsonl, .json, .parquet, .pt files"):
            read(tmp_path)


def changed(name, **columns):
    """The rows of a format, its second one with these columns; None takes one away."""
    rows = [dict(row) for row in FORMATS[name][3]]
    rows[1] = {key: value for key, value in (rows[1] | columns).items() if value is not None}
    return rows


@pytest.mark.parametrize(
    "name, columns, named",
    [
        ("trl", {"prompt": None}, "line 2: only .*, expected one of prompt_ids, prompt, input"),
        ("trl", {"step": 8}, "rows of 2 steps"),
        ("trl", {"step": 7.0}, "line 2: step: 7.0, expected a whole number"),
        ("trl", {"advantage": "a"}, "line 2: advantage: 'a', expected a finite number"),
        ("verl", {"uid": "a_b"}, "line 2: uid: 'a_b', expected SAMPLE_ROLLOUT_OUTPUT"),
        ("verl", {"output": None}, "line 2: response: NoneType, expected text"),
        ("prime-rl", {"loss_mask": [0, 1]}, "line 2: loss_mask: 2 values, expected one for each of 4 tokens"),
        ("prime-rl", {"loss_mask": [0, 0, 2, 1]}, "line 2: loss_mask: .*, expected 0s and 1s"),
        ("prime-rl", {"loss_mask": [1, 0, 0, 1]}, "line 2: loss_mask: 1 at the first token"),
        (
            "prime-rl",
            {"inference_logprobs": [0, 0, 0, [None]]},
            "line 2: inference_logprobs: .None., expected a finite",
        ),
        ("prime-rl", {"advantages": None}, "line 2: no advantages, expected one in every row"),
        ("prime-rl", {"rewards": [0, 0, 1, 2]}, "line 2: rewards: 2 different ones at generated tokens"),
        ("prime-rl", {"ce_weights": [0, 0, 1, 1]}, "line 2: ce_weights: not 0: tokens to imitate"),
        ("nemo-rl", {"input_lengths": [9]}, "line 2: input_lengths: 9, expected a whole number from 0 to 6"),
        ("nemo-rl", {"sample_loss_mask": [0.5]}, "line 2: sample_loss_mask: 0.5, expected 0 or 1"),
        ("nemo-rl", {"token_ids": [[5.0] * 6]}, "line 2: token_ids: .*, expected a list of token ids"),
        ("open-instruct", {"response_tokens": "ab"}, "line 2: response_tokens: 'ab', expected a list of token ids"),
        ("open-instruct", {"logprobs": None}, "line 2: no logprobs, expected one as in other rows"),
        ("open-instruct", {"request_info": {"tool_calleds": True}}, "line 2: request_info: tools were called"),
        ("areal", {"head_version": 6}, "line 2: head_version 6, tail_version 7: sampled by several policies"),
        ("areal", {"completion": [1]}, "line 2: completion: list, expected text"),
        ("slime", {"response_length": 5}, "sample 2: response_length: 5, expected a whole number from 0 to 4"),
        ("slime", {"rollout_log_probs": [0.0]}, "sample 2: rollout_log_probs: 1 values, expected one for each of 2"),
        ("slime", {"weight_versions": ["1", "2"]}, "sample 2: weight_versions: .*, expected one policy"),
        ("slime", {"group_index": None}, "sample 2: no group_index"),
    ],
)
def test_bad_values_are_refused_by_row_and_column(tmp_path, name, columns, named):
    _, _, write, _, arguments = FORMATS[name]
    with pytest.raises(ValueError, match=named) as error:
        read(write(tmp_path / "bad", changed(name, **columns)), **arguments)
    assert "bad" in str(error.value)


def test_rollouts_left_out_of_the_loss_are_said_to_count(tmp_path):
    path = files.as_json_lines(tmp_path / "n", changed("nemo-rl", sample_loss_mask=[0]))
    batch, _, warned = read(path)
    assert per_token(batch) == [0.5, 0.25, -0.125, 0, 0, 0, 0] and batch.response_lens[1] == 2
    assert "1 of 3 rollouts were left out of the loss (sample_loss_mask)" in warned[0]
    _, _, warned = read(files.as_saved(tmp_path / "s", changed("slime", remove_sample=True)))
    assert "1 of 3 rollouts were left out of the loss (remove_sample)" in warned[0]


def test_lengths_that_text_does_not_give_back_are_said(tmp_path):
    path = files.as_json_lines(tmp_path / "a", changed("areal", seqlen=9))
    _, _, warned = read(path, tokenizer=letters())
    assert len(warned) == 1 and "1 of 3 rollouts encode to another number of tokens" in warned[0]


def test_padding_of_nemo_rl_is_no_part_of_a_rollout(tmp_path):
    """Also where the mask says that it was generated, and in a row of which nothing was."""
    rows = changed("nemo-rl", token_loss_mask=[[0] * 6])
    rows[2]["token_loss_mask"] = [[0, 1, 1, 1, 1, 1]]
    batch, _, _ = read(files.as_json_lines(tmp_path / "n", rows))
    assert [batch.row(i)[0] for i in range(3)] == [r.tokens for r in ROLLOUTS]
    assert batch.response_lens.tolist() == [3, 0, 2] and batch.sampler_logp.tolist()[3:] == ROLLOUTS[2].logp


class TestFiles:
    def test_nothing_in_a_pickle_is_run(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return Path.touch, (tmp_path / "harm",)

        path = files.as_saved(tmp_path / "s.pt", files.slime())
        path = files.as_saved(path, [sample | {"metadata": Harm()} for sample in files.slime()])
        with pytest.raises(ValueError, match="s.pt: cannot be read .*, expected slime's"):
            read(path)
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize(
        "content, named",
        [
            (b"", "no rollouts"),
            (b"[]", "no rollouts"),
            (b"[1]", "item 1: int, expected an object"),
            (b'[{"a": 1}', "broken JSON"),
            (b'{"a": 1}', "line 1: only 'a', expected the columns of a format that is read .a completions log of TRL"),
            (b"{}", "line 1: only nothing"),
            (b"PAR1", "cannot be read"),
            (b"PK\x03\x04", "not a file of torch.save"),
            (b"\x80\x02}", "line 1: not UTF-8"),
        ],
    )
    def test_what_is_none_of_them(self, tmp_path, content, named):
        path = tmp_path / "odd"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"odd: {named}"):
            read(path)

    def test_saved_by_torch_but_not_by_slime(self, tmp_path):
        import torch

        for value in ([1], {"samples": 1}, {"a": torch.ones(1)}):
            torch.save(value, tmp_path / "x.pt")
            with pytest.raises(ValueError, match="x.pt: a (list|dict) without a list of samples"):
                read(tmp_path / "x.pt")

    def test_without_pyarrow_parquet_says_what_is_missing(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        with pytest.raises(ValueError, match=r"needs pyarrow; pip install 'dentropy\[probe\]'"):
            read(LOG)


def test_dentropys_own_files_are_read_as_ever(tmp_path):
    batch = PackedBatch.from_rows(
        [r.tokens for r in ROLLOUTS],
        [r.generated for r in ROLLOUTS],
        reward=[1, 2, 3],
        temperature=[0.5, 1, 2],
        sampler_logp=[r.logp for r in ROLLOUTS],
    )
    batch.to_jsonl(tmp_path / "own")
    again, said, _ = read(tmp_path / "own", temperature=None)
    for column in ("tokens", "generated", "row_lens", "group", "reward", "temperature", "sampler_logp"):
        assert np.array_equal(getattr(again, column), getattr(batch, column)), column
    assert not said
