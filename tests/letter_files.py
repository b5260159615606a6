"""Rollout files read with small real tokenizers: one token per letter, special tokens by name."""

import json
import warnings

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dentropy import PackedBatch

SPECIAL = ["<unk>", "<s>", "</s>", "<turn>", "<user>"]  # ids 0 to 4
LETTERS = {letter: i for i, letter in enumerate("abcdefghijkl\ufffd", len(SPECIAL))}
TURNS = "{% for m in messages %}<user>{{ m.content }}<turn>{% endfor %}{{ '<user>' if add_generation_prompt }}"


def ids(text):
    return [LETTERS[letter] for letter in text]


def letters(*, single="$A", template=None, extra=(), lowercase=False, **named):
    """A tokenizer that puts `single` around a text, with the tokens `extra` beside its named ones special."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *LETTERS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | named
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=list(extra), **named)
    tokenizer.chat_template = template
    return tokenizer


def read(tmp_path, *rows, **arguments):
    """The batch in a file of these rows, and what was warned of."""
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return PackedBatch.from_jsonl(path, **arguments), [str(warning.message) for warning in said]
