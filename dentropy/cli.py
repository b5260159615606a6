"""The command line: dentropy demo, probe, sample and show.

Bad input ends with exit code 2 and one line on stderr. Heavy packages load inside the commands that need
them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from dentropy import __version__

DTYPES = ("float32", "float64", "bfloat16", "float16")
DEFAULT_STEPS = (-1.0, -0.5, 0.5, 1.0, 2.0)
MAX_NEW_TOKENS = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for bad input and for rollouts too long for the memory there is.

    `argv` None means the command line's.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # argparse takes -1e-6 for an option; behind a space it is a value, and float() does not mind the space.
    arguments = [f" {argument}" if _is_negative_number(argument) else argument for argument in arguments]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options = _parser().parse_args(arguments)
            options.run(options)
        except (ValueError, OSError, MemoryError) as error:
            print(f"dentropy: {_one_line(error)}", file=sys.stderr)
            return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line; the usage is in --help."""

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


class _LazyTokenizer:
    """The policy's tokenizer, loaded at its first use: rollouts of token ids need none."""

    loaded = None

    def __init__(self, policy: str):
        self._policy = policy

    def load(self):
        if self.loaded is None:
            from transformers import AutoTokenizer

            self.loaded = AutoTokenizer.from_pretrained(self._policy)
        return self.loaded

    def load_for_the_report(self):
        """The tokenizer, or None and a warning: a policy saved without one is probed on token ids."""
        try:
            return self.load()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"--policy: no tokenizer there, report.html shows token ids ({reason})", stacklevel=2)
            return None

    def __getattr__(self, name: str):
        return getattr(self.load(), name)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dentropy", description="What a weight update does to a language-model policy's entropy.")
    parser.add_argument("--version", action="version", version=f"dentropy {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{demo,probe,sample,show}")
    _add_demo(commands)
    _add_probe(commands)
    _add_sample(commands)
    _add_show(commands)
    return parser


def _add_demo(commands) -> None:
    command = commands.add_parser("demo", help="the whole experiment on a small policy that comes with the package")
    command.add_argument("--out", metavar="DIR", help="run folder (default: the first free dentropy-demo-N)")
    command.add_argument("--seed", type=int, default=0, help="seed of all sampling (default: %(default)s)")
    command.set_defaults(run=_demo)


def _demo(options) -> None:
    from dentropy.demo.run import load_tokenizer, run
    from dentropy.experiment.results import check_out

    check_out(options.out or _free_folder())
    _load_libraries()
    result = run(seed=options.seed)
    # Chosen only now: another demo may have taken the number meanwhile.
    _finish(result, Path(options.out or _free_folder()), load_tokenizer())


def _free_folder() -> Path:
    number = 1
    while Path(f"dentropy-demo-{number}").exists():
        number += 1
    return Path(f"dentropy-demo-{number}")


def _add_probe(commands) -> None:
    command = commands.add_parser("probe", help="predict and measure the entropy change along an update")
    command.add_argument("--policy", required=True, metavar="DIR_OR_ID", help="model before the update")
    command.add_argument("--rollouts", required=True, metavar="FILE", help="JSON lines: rollouts of this policy")
    update = command.add_mutually_exclusive_group(required=True)
    update.add_argument("--after", metavar="DIR", help="model after the update")
    update.add_argument("--direction", metavar="FILE", help="direction v, as safetensors")
    update.add_argument("--update-rollouts", metavar="FILE", help="rewarded rollouts: take their policy gradient")
    command.add_argument("--optimizer", choices=("sgd", "adamw"), help="of --update-rollouts (default: adamw)")
    command.add_argument("--optimizer-state", metavar="FILE", help="its saved state (torch.save of state_dict())")
    command.add_argument(
        "--step-size",
        type=float,
        metavar="X",
        help="the η that is the update itself, for an optimizer step its learning rate; "
        "may be left out with --direction, where the file says it",
    )
    command.add_argument(
        "--etas",
        type=float,
        nargs="+",
        metavar="X",
        help=f"where to measure (default: step size times {', '.join(f'{s:g}' for s in DEFAULT_STEPS)})",
    )
    command.add_argument("--append-eos", action="store_true", help="add the end token to responses given as text")
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
        "--compile-layers",
        action="store_true",
        help="compile decoder layers with their tangents: tens of seconds at first, faster passes on a GPU",
    )
    command.add_argument(
        "--skip-parameters",
        action="store_true",
        help="leave out the parameters' shares, which need a gradient's memory",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="run folder, new or empty")
    _add_model_options(command)
    command.set_defaults(run=_probe)


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


def _probe(options) -> None:
    from dentropy.experiment.probe import check_etas, probe, tokens_to_run
    from dentropy.experiment.progress import token_bar
    from dentropy.experiment.results import check_out
    from dentropy.model.policy import Policy
    from dentropy.rollouts.batch import PackedBatch

    out = check_out(options.out)
    if options.step_size is None and options.direction is None:
        raise ValueError("--step-size: needed with --after and --update-rollouts")
    if options.update_rollouts is None and (options.optimizer or options.optimizer_state):
        raise ValueError("--optimizer and --optimizer-state: only with --update-rollouts")
    etas = None if options.etas is None else check_etas(options.etas)
    _load_libraries()
    tokenizer = _LazyTokenizer(options.policy)
    batch = PackedBatch.from_jsonl(options.rollouts, tokenizer, append_eos=options.append_eos)
    policy = Policy.from_pretrained(options.policy, **_placement(options), compile_layers=options.compile_layers)
    direction = _direction(options, policy, tokenizer)
    etas = etas or [step * direction.step_size for step in DEFAULT_STEPS]
    for_report = tokenizer.load_for_the_report()
    parameters = not options.skip_parameters
    with token_bar("passes", tokens_to_run(policy, batch, etas, parameters)) as progress:
        result = probe(
            policy,
            batch,
            direction,
            etas,
            token_budget=options.token_budget,
            prompts=options.prompt_set,
            parameters=parameters,
            progress=progress,
        )
    named = {name: getattr(options, name) for name in ("policy", "rollouts", "after", "direction", "update_rollouts")}
    source = {name: str(value) for name, value in named.items() if value is not None}
    _finish(dataclasses.replace(result, source=source), out, for_report)


def _direction(options, policy, tokenizer):
    from dentropy.experiment.progress import token_bar
    from dentropy.model.direction import Direction
    from dentropy.passes.policy_gradient import policy_gradient_direction
    from dentropy.rollouts.batch import PackedBatch

    if options.after is not None:
        # The folder in its own dtype shows what rounding to bf16 has lost; the float32 model would hide it.
        before = options.policy if Path(options.policy).is_dir() else policy.model
        return Direction.between(before, options.after, options.step_size)
    if options.direction is not None:
        direction = Direction.load(options.direction)
        return direction if options.step_size is None else Direction(direction.tensors, options.step_size)
    batch = PackedBatch.from_jsonl(options.update_rollouts, tokenizer, append_eos=options.append_eos)
    state = None if options.optimizer_state is None else _load_state(options.optimizer_state)
    with token_bar("policy gradient", batch.n_tokens) as progress:
        return policy_gradient_direction(
            policy,
            batch,
            step_size=options.step_size,
            token_budget=options.token_budget,
            progress=progress,
            optimizer=options.optimizer or "adamw",
            optimizer_state=state,
        )


def _load_state(path: str) -> dict:
    import zipfile

    import torch

    if not zipfile.is_zipfile(path):  # the unpickler raises almost anything on other files
        raise ValueError(f"--optimizer-state: {path} is not a file of torch.save")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"--optimizer-state: {path} is not a file of torch.save") from error
    if not isinstance(state, dict):
        raise ValueError(
            f"--optimizer-state: {path} holds a {type(state).__name__}, expected an optimizer's state_dict()"
        )
    return state


def _add_sample(commands) -> None:
    command = commands.add_parser("sample", help="draw rollouts from a policy")
    command.add_argument("--policy", required=True, metavar="DIR_OR_ID")
    command.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help='JSON lines with "prompt" (text or chat messages) or "prompt_ids"',
    )
    command.add_argument("--per-prompt", type=int, default=8, metavar="N", help="responses (default: %(default)s)")
    command.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"(default: {MAX_NEW_TOKENS}, or what the policy's positions leave behind the longest prompt)",
    )
    command.add_argument("--temperature", type=float, default=1.0, metavar="X", help="(default: %(default)s)")
    command.add_argument("--top-p", type=float, default=1.0, help="off (1.0) is all that is accepted")
    command.add_argument("--top-k", type=int, default=0, help="off (0) is all that is accepted")
    command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    command.add_argument("--out", required=True, metavar="FILE", help="a new file, JSON lines")
    _add_model_options(command)
    command.set_defaults(run=_sample)


def _sample(options) -> None:
    from dentropy.experiment.progress import rollout_bar
    from dentropy.model.policy import Policy
    from dentropy.rollouts.sampling import read_prompts, sample

    if options.top_p != 1.0 or options.top_k != 0:
        raise ValueError(
            f"--top-p {options.top_p:g}, --top-k {options.top_k}: expected both off (1.0 and 0): rollouts "
            "cut by them come from another distribution than the one entropy and weights are of"
        )
    out = _new_file(options.out)
    _load_libraries()
    tokenizer = _LazyTokenizer(options.policy)
    prompts = read_prompts(options.prompts, tokenizer)
    policy = Policy.from_pretrained(options.policy, **_placement(options))
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = _what_fits(policy, prompts)
    with rollout_bar("sampling", len(prompts) * options.per_prompt) as progress:
        batch = sample(
            policy,
            prompts,
            per_prompt=options.per_prompt,
            max_new_tokens=max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            progress=progress,
        )
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        batch.to_jsonl(unfinished, tokenizer.loaded)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"{len(batch):,} rollouts of {batch.n_groups:,} prompts, {batch.n_tokens:,} tokens: {out}")


def _what_fits(policy, prompts: list[list[int]]) -> int:
    """MAX_NEW_TOKENS, or what the policy's positions leave; 1 where they leave none, for `sample` to refuse by name."""
    if policy.max_positions is None:
        return MAX_NEW_TOKENS
    return max(1, min(MAX_NEW_TOKENS, policy.max_positions - max(map(len, prompts))))


def _new_file(path: str) -> Path:
    out = Path(path)
    if out.exists():
        raise ValueError(f"--out: {out} exists, expected a new file")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ValueError(f"--out: {out.absolute().parent} is not a folder that can be written")
    return out


def _add_show(commands) -> None:
    command = commands.add_parser("show", help="print the summary of a finished run")
    command.add_argument("folder", metavar="DIR", help="run folder")
    command.set_defaults(run=_show)


def _show(options) -> None:
    from dentropy.experiment.results import load
    from dentropy.experiment.summary import summary

    print(summary(load(options.folder)))


def _finish(result, out: Path, tokenizer) -> None:
    result.save(out, tokenizer)
    print(result.summary())
    print(f"\nFiles in {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


def _add_model_options(command) -> None:
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    command.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")


def _placement(options) -> dict:
    """Keyword arguments of Policy.from_pretrained."""
    import torch

    try:
        device = None if options.device is None else torch.device(options.device)
    except RuntimeError as error:
        raise ValueError(f"--device: {options.device!r} is not a device") from error
    if device is not None and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {options.device}, expected cpu or cuda")
    if device is not None and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: no {options.device} here, {torch.cuda.device_count()} CUDA devices were found")
    return {"dtype": getattr(torch, options.dtype), "device": device}


def _load_libraries() -> None:
    """What the commands need beyond the core, at once: a missing package must not show after hours of work.

    Without the loading bars and advice of transformers: stderr is for our progress and for errors.
    """
    try:
        import matplotlib  # noqa: F401
        import safetensors  # noqa: F401
        import tqdm  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'dentropy[probe]' brings what the commands need") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"dentropy: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _is_negative_number(argument: str) -> bool:
    try:
        return argument.startswith("-") and float(argument) == float(argument)
    except ValueError:
        return False
