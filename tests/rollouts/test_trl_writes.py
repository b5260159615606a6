"""A conversational log that TRL itself writes, read back."""

import pytest
from datasets import Dataset
from trainers import sampling_trainer

from dentropy import read_rollouts
from dentropy.demo import task


@pytest.mark.slow
def test_a_log_of_messages_that_trl_wrote(tmp_path):
    """The template writes contents alone, so the prompts that the policy saw are the texts of the task."""
    prompts = task.prompts(16, 0)
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in prompts]})
    settings = dict(max_steps=1, log_completions=True, logging_steps=1)
    trainer = sampling_trainer("grpo", tmp_path, dataset=dataset, settings=settings)
    tokenizer = trainer.processing_class
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    trainer.reward_funcs = [lambda completions, **_: [float(len(message["content"])) for (message,) in completions]]
    trainer.train()
    said = []
    batch = read_rollouts(
        tmp_path, tokenizer, append_eos=True, end_tokens=[1], max_new_tokens=6, temperature=1.5, say=said.append
    )
    assert len(batch) == 8 and batch.n_groups == 2 and "a completions log of TRL (8 rows, step 1)" in said[0]
    assert {tokenizer.decode(batch.prompt(i)) for i in range(8)} <= set(prompts)
    assert batch.reward is not None and abs(batch.advantage.sum()) < 1e-5 and batch.response_lens.max() <= 6
