"""dentropy probe."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
from pathlib import Path

from dentropy.cli.apart import apart, check_files
from dentropy.cli.keeping import finish
from dentropy.cli.options import LazyTokenizer, add_model_options, load_libraries, placement

DEFAULT_STEPS = (-1.0, -0.5, 0.5, 1.0, 2.0)


def add(commands) -> None:
    command = commands.add_parser("probe", help="predict and measure the entropy change along an update")
    command.add_argument("--policy", required=True, metavar="DIR_OR_ID", help="model before the update")
    command.add_argument("--rollouts", required=True, metavar="FILE", help="JSON lines: rollouts of this policy")
    update = command.add_mutually_exclusive_group(required=True)
    update.add_argument("--after", metavar="DIR", help="model after the update")
    update.add_argument("--direction", metavar="FILE", help="direction v, as safetensors")
    update.add_argument("--update-rollouts", metavar="FILE", help="rewarded rollouts: take their policy gradient")
    command.add_argument(
        "--split",
        action="store_true",
        help="make the update from half of the prompts of --update-rollouts and judge it on the others: for one file "
        "as both --rollouts and --update-rollouts",
    )
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
        help="compile decoder layers with their tangents: experimental, no gain recorded yet",
    )
    command.add_argument(
        "--skip-parameters",
        action="store_true",
        help="leave out the parameters' shares, which need a gradient's memory",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="run folder, new or empty")
    add_model_options(command)
    command.set_defaults(run=run)


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


def run(options) -> None:
    from dentropy.experiment.probe import check_etas, n_passes, probe
    from dentropy.experiment.progress import token_bar
    from dentropy.experiment.run_folder import check_out
    from dentropy.model.policy import Policy
    from dentropy.rollouts.batch import PackedBatch

    out = check_out(options.out)
    if options.step_size is None and options.direction is None:
        raise ValueError("--step-size: needed with --after and --update-rollouts")
    if options.update_rollouts is None and (options.optimizer or options.optimizer_state):
        raise ValueError("--optimizer and --optimizer-state: only with --update-rollouts")
    check_files(options)
    etas = None if options.etas is None else check_etas(options.etas)
    load_libraries()
    tokenizer = LazyTokenizer(options.policy)
    batch = PackedBatch.from_jsonl(options.rollouts, tokenizer, append_eos=options.append_eos)
    update, divided = None, None
    if options.update_rollouts is not None:
        update = PackedBatch.from_jsonl(options.update_rollouts, tokenizer, append_eos=options.append_eos)
        batch, update, divided = apart(batch, update, options.split)
    policy = Policy.from_pretrained(options.policy, **placement(options), compile_layers=options.compile_layers)
    direction = _direction(options, policy, update)
    etas = etas or [step * direction.step_size for step in DEFAULT_STEPS]
    for_report = tokenizer.load_for_the_report()
    parameters = not options.skip_parameters
    with token_bar("passes", batch.n_tokens * n_passes(policy, etas, parameters)) as progress:
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
    source = {name: str(value) for name, value in (named | {"split": divided}).items() if value is not None}
    finish(dataclasses.replace(result, source=source), out, for_report)


def _direction(options, policy, update):
    from dentropy.experiment.progress import token_bar
    from dentropy.model.direction import Direction
    from dentropy.passes.policy_gradient import policy_gradient_direction

    if options.after is not None:
        # The folder in its own dtype shows what rounding to bf16 has lost; the float32 model would hide it.
        before = options.policy if Path(options.policy).is_dir() else policy.model
        return Direction.between(before, options.after, options.step_size)
    if options.direction is not None:
        direction = Direction.load(options.direction)
        return direction if options.step_size is None else Direction(direction.tensors, options.step_size)
    state = None if options.optimizer_state is None else _load_state(options.optimizer_state)
    with token_bar("policy gradient", update.n_tokens) as progress:
        return policy_gradient_direction(
            policy,
            update,
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
