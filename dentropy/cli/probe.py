"""dentropy probe."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import nullcontext
from pathlib import Path

from dentropy.cli import loss, reference
from dentropy.cli.apart import apart, check_files
from dentropy.cli.group import process_group
from dentropy.cli.keeping import finish
from dentropy.cli.options import (
    LazyTokenizer,
    add_model_options,
    add_pass_options,
    add_reading_options,
    load_libraries,
    loading,
)
from dentropy.cli.processes import count, ended_by_sigterm, is_first
from dentropy.cli.terminal import about, remark

DEFAULT_STEPS = (-1.0, -0.5, 0.5, 1.0, 2.0)
UPDATE_GROUPS = ("positive-advantage", "negative-advantage", "end-token", "high-entropy", "low-entropy")
DEFAULT_GROUPS = UPDATE_GROUPS[:2]
SOURCES = ("policy", "rollouts", "after", "direction", "update_rollouts", "loss_kl_reference")
# What else the passes depend on: an unfinished run goes on with the same.
SETTINGS = (
    "step_size",
    "etas",
    "prompt_set",
    "token_budget",
    "compile_layers",
    "shard",
    "skip_parameters",
    "pass_at_k",
    "update_groups",
    "optimizer",
    "optimizer_state",
    "max_grad_norm",
    *(f"loss_{name}" for name in loss.OPTIONS),
)


def add(commands) -> None:
    command = commands.add_parser("probe", help="predict and measure the entropy change along an update")
    command.set_defaults(run=run)
    group = command.add_argument_group("what is read and written")
    group.add_argument("--policy", required=True, metavar="DIR_OR_ID", help="model before the update")
    group.add_argument("--rollouts", required=True, metavar="PATH", help="rollouts of this policy: a file or a folder")
    group.add_argument("--out", required=True, metavar="DIR", help="run folder, new or empty")
    group = command.add_argument_group("the update (--after, --direction or --update-rollouts)")
    update = group.add_mutually_exclusive_group()
    update.add_argument("--after", metavar="DIR", help="model after the update")
    update.add_argument("--direction", metavar="FILE", help="direction v, as safetensors")
    group.add_argument(
        "--update-rollouts",
        metavar="PATH",
        help="rewarded rollouts: take the step of their policy gradient, or, with --after or --direction, explain that "
        "update by them",
    )
    group.add_argument(
        "--split",
        action="store_true",
        help="make the update from half of the prompts of --update-rollouts and judge it on the others: for one file "
        "as both --rollouts and --update-rollouts",
    )
    group.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), help="of --update-rollouts (default: adamw)")
    group.add_argument(
        "--optimizer-state",
        metavar="PATH",
        help="its saved state (torch.save of state_dict()), or a checkpoint with it",
    )
    group.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="at which its gradient's norm is clipped (default: it is not)"
    )
    loss.add(group)
    group.add_argument(
        "--step-size",
        type=float,
        metavar="X",
        help="the η that is the update itself, for an optimizer step its learning rate; "
        "may be left out with --direction, where the file says it",
    )
    group.add_argument(
        "--etas",
        type=float,
        nargs="+",
        metavar="X",
        help=f"where to measure (default: step size times {', '.join(f'{s:g}' for s in DEFAULT_STEPS)})",
    )
    group = command.add_argument_group("what rollouts do not say themselves")
    add_reading_options(group)
    group.add_argument(
        "--step", type=int, metavar="N", help="which step's rollouts, where a file or folder has several"
    )
    group = command.add_argument_group("what is computed and how")
    group.add_argument(
        "--compile-layers",
        action="store_true",
        help="compile decoder layers with their tangents: experimental, no gain recorded yet",
    )
    group.add_argument(
        "--shard",
        action="store_true",
        help="under torchrun: spread the policy over the processes (FSDP2), none of which ever holds all of it; "
        "safetensors, DCP, verl's rank files or LoRA adapters",
    )
    group.add_argument(
        "--pass-at-k",
        type=int,
        nargs="+",
        default=(),
        metavar="K",
        help="forecast pass@K too: needs rewards of 0 and 1 and K rollouts or more for every prompt",
    )
    group.add_argument(
        "--update-groups",
        nargs="*",
        choices=UPDATE_GROUPS,
        metavar="NAME",
        help="tokens of --update-rollouts whose part in the change has an error bar, for a reverse pass and one with "
        f"tangents each: {', '.join(UPDATE_GROUPS)} (default: the first two, whose passes are one's where they are the "
        "whole step; without a name: none)",
    )
    group.add_argument(
        "--on-nonfinite",
        choices=("raise", "drop"),
        default="raise",
        help="what becomes of rollouts whose statistics are not finite: an error that names the first, or all are "
        "left out, named and counted (default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the unfinished run of the same command; start anew where there is none",
    )
    add_pass_options(group)
    add_model_options(group)


def run(options) -> None:
    from dentropy.passes.ranks import exchange, lockstep, together

    with process_group(options.terminal.complain):
        etas = together(_checked)(options)
        if options.shard:
            exchange(None)  # from here on ranks wait for each other, in the middle of anything
        with lockstep() if options.shard else nullcontext():
            together(_run)(options, etas)


def _checked(options):
    """The etas, None where the direction is to say them; ValueError for what is wrong before anything is loaded."""
    from dentropy.experiment.probe import check_etas
    from dentropy.experiment.resumable import check_unfinished
    from dentropy.experiment.run_folder import check_out

    if is_first():
        check_unfinished(check_out(options.out), options.resume)
    if options.update_rollouts is None and options.after is None and options.direction is None:
        raise ValueError("--after, --direction, --update-rollouts: one of the arguments is needed, expected the update")
    if options.step_size is None and options.direction is None:
        raise ValueError("--step-size: needed with --after and --update-rollouts")
    if options.update_rollouts is None and (options.optimizer or options.optimizer_state or options.max_grad_norm):
        raise ValueError("--optimizer, --optimizer-state and --max-grad-norm: only with --update-rollouts")
    loss.check(options)
    if options.update_rollouts is None and options.update_groups:
        raise ValueError("--update-groups: only with --update-rollouts")
    if options.max_new_tokens is not None and not options.append_eos:
        raise ValueError("--max-new-tokens: only with --append-eos")
    if options.shard and count() == 1:
        raise ValueError("--shard: in one process, expected several: torchrun --nproc-per-node K -m dentropy probe ...")
    if options.shard and options.resume and options.update_rollouts is not None:
        raise ValueError("--resume: with --shard and --update-rollouts, whose gradient is not kept, expected --after")
    check_files(options)
    etas = None if options.etas is None else check_etas(options.etas)
    load_libraries()
    return etas


def _run(options, etas) -> None:
    from dentropy.model.fingerprint import parameter_fingerprints, unchanged
    from dentropy.model.policy import Policy

    tokenizer = LazyTokenizer(options.policy, options.trust_remote_code)
    with about("--policy"):
        settings = {"compile_layers": options.compile_layers, "shard": options.shard}
        policy = Policy.from_pretrained(options.policy, **loading(options), **settings)
    recognized: list[str] = []  # said once all input stands: what is refused gets one line
    with about("--rollouts"):
        batch = _rollouts(options.rollouts, options, policy, tokenizer, recognized.append)
    update, divided = None, None
    if options.update_rollouts is not None:
        with about("--update-rollouts"):
            update = _rollouts(options.update_rollouts, options, policy, tokenizer, recognized.append)
        batch, update, divided = apart(batch, update, options.split)
    kl_to = reference.of_update(options, policy, update)
    direction = _direction(options, policy)
    for_report = tokenizer.load_for_the_report()
    for text in recognized:
        remark(text)
    weights = parameter_fingerprints(policy.model)
    with ended_by_sigterm(), _store(options, policy, batch, direction, update, weights, kl_to) as store:
        with unchanged(policy.model, weights):
            result = _passes(options, policy, batch, direction, update, etas, store, kl_to)
        named = {name: getattr(options, name) for name in SOURCES}
        source = {name: str(value) for name, value in (named | {"split": divided}).items() if value is not None}
        if is_first():
            finish(dataclasses.replace(result, source=source, command=options.command), Path(options.out), for_report)


def _store(options, policy, batch, direction, update, weights, kl_to):
    """What is finished is kept in it, by the first process."""
    from dentropy.experiment.identity import identity
    from dentropy.experiment.resumable import unfinished_run
    from dentropy.passes.optimizer_state import state_file

    if not is_first() and not options.shard:
        return nullcontext()
    settings = {name: getattr(options, name) for name in SETTINGS}
    if options.optimizer_state is not None:
        settings["optimizer_state"] = hashlib.sha256(state_file(options.optimizer_state).read_bytes()).hexdigest()
    settings["loss_kl_reference"] = None if kl_to is None else kl_to.fingerprint
    # Of what ranks hold in parts all of them must say it.
    found = identity(policy, batch, direction, update, settings, weights)
    return unfinished_run(Path(options.out), found) if is_first() else nullcontext()


def _passes(options, policy, batch, direction, update, etas, store, kl_to):
    """The ProbeResult."""
    from dentropy.experiment.probe import check_etas, probe, tokens_to_run
    from dentropy.experiment.progress import token_bar
    from dentropy.passes.finished import keeping

    step = None
    if update is not None:
        with keeping(store, "update", gradient=True):
            step = _step(options, policy, update, options.step_size or direction.step_size, kl_to)
        direction = direction or step.direction()
    etas = etas or check_etas([step * direction.step_size for step in DEFAULT_STEPS])
    parameters = not options.skip_parameters
    named = DEFAULT_GROUPS if options.update_groups is None else options.update_groups
    groups = [] if step is None else [name.replace("-", " ") for name in named]
    total = tokens_to_run(policy, batch, etas, parameters, step, groups)
    with token_bar("passes", total) as progress, keeping(store, "probe"):
        return probe(
            policy,
            batch,
            direction,
            etas,
            token_budget=options.token_budget,
            prompts=options.prompt_set,
            parameters=parameters,
            pass_at_k=options.pass_at_k,
            update=step,
            groups=groups,
            on_nonfinite=options.on_nonfinite,
            progress=progress,
        )


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
            how = {"trust_remote_code": options.trust_remote_code, "shard": options.shard}
            return Direction.between(before, options.after, options.step_size, **how)
    if options.direction is None:
        return None
    direction = Direction.load(options.direction, policy.model if options.shard else None)
    return direction if options.step_size is None else Direction(direction.tensors, options.step_size)


def _step(options, policy, update, step_size, kl_to):
    """The step that --update-rollouts make."""
    from dentropy.experiment.progress import token_bar
    from dentropy.passes.optimizer_state import load_state
    from dentropy.passes.policy_gradient import policy_gradient_step

    state = None if options.optimizer_state is None else load_state(options.optimizer_state)
    minimized = loss.of_update(options, update, None if kl_to is None else kl_to.logp)
    tokens = (2 if minimized.needs_logp else 1) * update.n_tokens
    with about("--update-rollouts"), token_bar("policy gradient", tokens) as progress:
        return policy_gradient_step(
            policy,
            update,
            step_size=step_size,
            loss=minimized,
            token_budget=options.token_budget,
            progress=progress,
            optimizer=options.optimizer or "adamw",
            optimizer_state=state,
            max_grad_norm=options.max_grad_norm,
        )
