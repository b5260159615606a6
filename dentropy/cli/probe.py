"""dentropy probe."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from dentropy.cli.apart import apart, check_files
from dentropy.cli.keeping import finish
from dentropy.cli.options import LazyTokenizer, add_model_options, load_libraries, loading
from dentropy.cli.terminal import about, remark
from dentropy.doors import saved_by_torch

OPTIMIZER = "optimizer.pt"  # the name under which trainers save its state in a checkpoint's folder
DEFAULT_STEPS = (-1.0, -0.5, 0.5, 1.0, 2.0)


def add(commands) -> None:
    command = commands.add_parser("probe", help="predict and measure the entropy change along an update")
    command.add_argument("--policy", required=True, metavar="DIR_OR_ID", help="model before the update")
    command.add_argument(
        "--rollouts", required=True, metavar="PATH", help="rollouts of this policy: a file or a folder"
    )
    update = command.add_mutually_exclusive_group()
    update.add_argument("--after", metavar="DIR", help="model after the update")
    update.add_argument("--direction", metavar="FILE", help="direction v, as safetensors")
    command.add_argument(
        "--update-rollouts",
        metavar="PATH",
        help="rewarded rollouts: take the step of their policy gradient, or, with --after or --direction, explain that "
        "update by them",
    )
    command.add_argument(
        "--split",
        action="store_true",
        help="make the update from half of the prompts of --update-rollouts and judge it on the others: for one file "
        "as both --rollouts and --update-rollouts",
    )
    command.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), help="of --update-rollouts (default: adamw)")
    command.add_argument(
        "--optimizer-state",
        metavar="PATH",
        help="its saved state (torch.save of state_dict()), or a checkpoint with it",
    )
    command.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="at which its gradient's norm is clipped (default: it is not)"
    )
    command.add_argument(
        "--update-group",
        type=lambda text: text.replace("-", " "),
        nargs="+",
        default=(),
        metavar="NAME",
        help="more groups of the update's tokens whose share gets an error bar: negative-advantage, high-entropy, "
        "low-entropy (always: positive-advantage, end-token); two passes each",
    )
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
        help="with --append-eos: where sampling cut responses off, which get no end token",
    )
    command.add_argument("--temperature", type=float, metavar="X", help="of sampling, where rollouts do not say it")
    command.add_argument("--reward-column", metavar="NAME", help="which column is the reward, where several may be")
    command.add_argument(
        "--step", type=int, metavar="N", help="which step's rollouts, where a file or folder has several"
    )
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
        help="leave out the parameters' shares, which need a gradient's memory (as those of the update's tokens do)",
    )
    command.add_argument(
        "--pass-at-k",
        type=int,
        nargs="+",
        default=(),
        metavar="K",
        help="forecast pass@K too: needs rewards of 0 and 1 and K rollouts or more for every prompt",
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
    from dentropy.experiment.probe import check_etas, probe, tokens_to_run
    from dentropy.experiment.progress import token_bar
    from dentropy.experiment.run_folder import check_out
    from dentropy.model.policy import Policy
    from dentropy.passes.token_groups import check_group

    out = check_out(options.out)
    if options.update_rollouts is None and options.after is None and options.direction is None:
        raise ValueError("--after, --direction, --update-rollouts: one of the arguments is needed, expected the update")
    if options.step_size is None and options.direction is None:
        raise ValueError("--step-size: needed with --after and --update-rollouts")
    if options.update_rollouts is None and (options.optimizer or options.optimizer_state or options.max_grad_norm):
        raise ValueError("--optimizer, --optimizer-state and --max-grad-norm: only with --update-rollouts")
    if options.update_rollouts is None and options.update_group:
        raise ValueError("--update-group: only with --update-rollouts")
    if options.max_new_tokens is not None and not options.append_eos:
        raise ValueError("--max-new-tokens: only with --append-eos")
    check_files(options)
    etas = None if options.etas is None else check_etas(options.etas)
    for name in options.update_group:
        check_group(name)
    load_libraries()
    tokenizer = LazyTokenizer(options.policy, options.trust_remote_code)
    with about("--policy"):
        policy = Policy.from_pretrained(options.policy, **loading(options), compile_layers=options.compile_layers)
    recognized: list[str] = []  # said once all input stands: what is refused gets one line
    with about("--rollouts"):
        batch = _rollouts(options.rollouts, options, policy, tokenizer, recognized.append)
    update, divided = None, None
    if options.update_rollouts is not None:
        with about("--update-rollouts"):
            update = _rollouts(options.update_rollouts, options, policy, tokenizer, recognized.append)
        batch, update, divided = apart(batch, update, options.split)
    direction = _direction(options, policy)
    step = None
    if update is not None:
        step = _step(options, policy, update, options.step_size or direction.step_size)
        direction = direction or step.direction()
    etas = etas or check_etas([step * direction.step_size for step in DEFAULT_STEPS])
    for_report = tokenizer.load_for_the_report()
    parameters = not options.skip_parameters
    for text in recognized:
        remark(text)
    with token_bar("passes", tokens_to_run(policy, batch, etas, parameters, step, options.update_group)) as progress:
        result = probe(
            policy,
            batch,
            direction,
            etas,
            token_budget=options.token_budget,
            prompts=options.prompt_set,
            parameters=parameters,
            pass_at_k=options.pass_at_k,
            update=step,
            update_groups=options.update_group,
            progress=progress,
        )
    named = {name: getattr(options, name) for name in ("policy", "rollouts", "after", "direction", "update_rollouts")}
    source = {name: str(value) for name, value in (named | {"split": divided}).items() if value is not None}
    finish(dataclasses.replace(result, source=source), out, for_report)


def _rollouts(path: str, options, policy, tokenizer, say):
    from dentropy.rollouts.reading import read_rollouts
    from dentropy.rollouts.sampling import end_tokens

    return read_rollouts(
        path,
        tokenizer,
        append_eos=options.append_eos,
        end_tokens=end_tokens(policy),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        reward=options.reward_column,
        step=options.step,
        say=say,
    )


def _direction(options, policy):
    """That of --after or --direction, None without."""
    from dentropy.model.direction import Direction

    if options.after is not None:
        # The folder in its own dtype shows what rounding to bf16 has lost; the float32 model would hide it.
        before = options.policy if Path(options.policy).is_dir() else policy.model
        with about("--after"):
            trust = options.trust_remote_code
            return Direction.between(before, options.after, options.step_size, trust_remote_code=trust)
    if options.direction is None:
        return None
    direction = Direction.load(options.direction)
    return direction if options.step_size is None else Direction(direction.tensors, options.step_size)


def _step(options, policy, update, step_size):
    """The step that --update-rollouts make."""
    from dentropy.experiment.progress import token_bar
    from dentropy.passes.policy_gradient import policy_gradient_step

    state = None if options.optimizer_state is None else load_state(options.optimizer_state)
    with about("--update-rollouts"), token_bar("policy gradient", update.n_tokens) as progress:
        return policy_gradient_step(
            policy,
            update,
            step_size=step_size,
            token_budget=options.token_budget,
            progress=progress,
            optimizer=options.optimizer or "adamw",
            optimizer_state=state,
            max_grad_norm=options.max_grad_norm,
        )


def load_state(path: str) -> dict:
    """The state_dict() of an optimizer, in a file or in a checkpoint's folder."""
    inside = Path(path) / OPTIMIZER
    path = inside if inside.is_file() else path
    expected = f"an optimizer's state_dict() by torch.save, or a folder with {OPTIMIZER}"
    state = saved_by_torch(path, expected, "optimizer_state")
    if not isinstance(state, dict):
        raise ValueError(f"optimizer_state: {path}: a {type(state).__name__}, expected an optimizer's state_dict()")
    return state
