"""What several commands share: options of the model and of rollouts, and the packages and tokenizer they need."""

from __future__ import annotations

import argparse
import warnings

from dentropy.cli.processes import own_device
from dentropy.doors import third_party

DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_model_options(command) -> None:
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    command.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with a model (default: never)"
    )


def add_reading_options(command) -> None:
    """What files of rollouts do not say."""
    command.add_argument(
        "--append-eos",
        nargs="?",
        const=True,
        default=False,
        metavar="TOKEN",
        help="add the end token to responses given as text: TOKEN, or the one the policy ends turns with",
    )
    command.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="where sampling cut responses off: with --append-eos, which puts no end token there",
    )
    command.add_argument("--temperature", type=float, metavar="X", help="of sampling, where rollouts do not say it")
    command.add_argument("--reward-column", metavar="NAME", help="which column is the reward, where several may be")


def add_pass_options(command) -> None:
    """How rollouts are used."""
    command.add_argument(
        "--prompt-set",
        choices=("random", "fixed"),
        default="random",
        help="what error bars are for: prompts drawn at random, or this fixed set (default: %(default)s)",
    )
    command.add_argument(
        "--token-budget",
        type=_token_budget,
        default="auto",
        metavar="auto|N",
        help="prompt and response tokens run at a time; memory follows it, results do not (default: auto, "
        "what fits on a GPU, 4096 on a CPU)",
    )
    command.add_argument(
        "--skip-parameters",
        action="store_true",
        help="leave out the parameters' shares, which need a gradient's memory (as those of the update's tokens do)",
    )


def _token_budget(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        budget = int(text)
    except ValueError:
        budget = 0
    if budget < 1:
        raise argparse.ArgumentTypeError(f"{text.strip()!r}, expected auto or a whole number of at least 1")
    return budget


def loading(options) -> dict:
    """Keyword arguments of Policy.from_pretrained."""
    import torch

    named = own_device(options.device)
    with third_party(f"--device: {options.device!r} is not a device", "cpu or cuda"):
        device = None if named is None else torch.device(named)
    if device is not None and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {options.device}, expected cpu or cuda")
    if device is not None and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {named}, expected one of the {torch.cuda.device_count()} CUDA devices here")
    dtype = getattr(torch, options.dtype)
    return {"dtype": dtype, "device": device, "trust_remote_code": options.trust_remote_code}


def load_libraries() -> None:
    """What the commands need beyond the core, at once: a missing package must not show after hours of work.

    Without the loading bars and advice of transformers: stderr is for our progress and for errors.
    """
    try:
        import jinja2  # noqa: F401
        import jsonschema  # noqa: F401
        import matplotlib  # noqa: F401
        import pyarrow  # noqa: F401
        import safetensors  # noqa: F401
        import tqdm  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'dentropy[probe]' brings what the commands need") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class LazyTokenizer:
    """The policy's tokenizer, loaded at its first use: rollouts of token ids need none."""

    loaded = None

    def __init__(self, policy: str, trust_remote_code: bool = False):
        self._policy, self._trust = policy, trust_remote_code

    def load(self):
        if self.loaded is None:
            from dentropy.model.checkpoint import load_tokenizer

            self.loaded = load_tokenizer(self._policy, "policy", trust_remote_code=self._trust)
        return self.loaded

    def load_for_the_report(self):
        """The tokenizer, or None and a warning: a policy saved without one is probed on token ids."""
        try:
            return self.load()
        except ValueError as error:
            warnings.warn(f"policy: no tokenizer there, report.html shows token ids ({error})", stacklevel=2)
            return None

    def __getattr__(self, name: str):
        return getattr(self.load(), name)
