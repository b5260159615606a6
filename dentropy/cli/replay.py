"""dentropy replay."""

from __future__ import annotations

from dentropy.cli.options import (
    LazyTokenizer,
    add_model_options,
    add_pass_options,
    add_reading_options,
    load_libraries,
    loading,
)
from dentropy.cli.terminal import remark, say

TRL = ("gradient_accumulation_steps", "steps_per_generation", "num_iterations")


def add(commands) -> None:
    command = commands.add_parser("replay", help="what each step of a training run did to the entropy")
    command.add_argument(
        "run_dir", metavar="RUN_DIR", help="a trainer's output folder, or a TOML or JSON file that lists checkpoints"
    )
    for name in TRL:
        command.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help="of TRL, where its logs do not tell which checkpoint sampled them (those left out: TRL's default)",
        )
    command.add_argument("--rollouts", metavar="DIR", help="of verl: its rollout_data_dir")
    command.add_argument(
        "--lag",
        type=int,
        metavar="N",
        help="of prime-rl: by how many steps the policy that samples is behind, to have each checkpoint judged by "
        "rollouts of its own (default: by the first export that made none of its steps, reweighted)",
    )
    command.add_argument(
        "--fresh", action="store_true", help="judge every step by rollouts drawn anew, to the prompts of the logs"
    )
    command.add_argument(
        "--update-tokens",
        action="store_true",
        help="explain each single optimizer step by the tokens that made it, where optimizer.pt is there: needs a "
        "second model in memory",
    )
    command.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), help="of --update-tokens (default: adamw)")
    command.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="at which its gradient's norm is clipped (default: it is not)"
    )
    command.add_argument("--seed", type=int, default=0, help="of rollouts drawn anew (default: %(default)s)")
    command.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder, or that of a replay, which is gone on with"
    )
    add_reading_options(command)
    add_pass_options(command)
    add_model_options(command)
    command.set_defaults(run=run)


def run(options) -> None:
    from dentropy.experiment.recorded_run import recorded_run
    from dentropy.experiment.replay import Settings, replay
    from dentropy.experiment.timeline import summary

    load_libraries()
    run = recorded_run(
        options.run_dir, rollouts=options.rollouts, schedule=_schedule(options), lag=options.lag, fresh=options.fresh
    )
    remark(f"{run.kind}: checkpoints of steps {', '.join(str(c.step) for c in run.checkpoints)}")
    tokenizer = LazyTokenizer(run.checkpoints[-1].path, options.trust_remote_code)
    settings = Settings(
        tokenizer=tokenizer.load_for_the_report(),
        loading=loading(options),
        reading={
            "append_eos": options.append_eos,
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "reward": options.reward_column,
        },
        prompts=options.prompt_set,
        token_budget=options.token_budget,
        parameters=not options.skip_parameters,
        update=_update(options),
        seed=options.seed,
    )
    content = replay(run, options.out, settings, remark)
    say(summary(content))
    names = "replay.json, report.html, timeline.csv, timeline.png"
    say(f"\nFiles in {options.out}: {names}, and in pairs a run folder for each step")


def _update(options) -> dict | None:
    """Arguments of `policy_gradient_step`; None where it is not asked for."""
    if options.update_tokens:
        return {"optimizer": options.optimizer or "adamw", "max_grad_norm": options.max_grad_norm}
    if options.optimizer or options.max_grad_norm:
        raise ValueError("--optimizer and --max-grad-norm: only with --update-tokens")
    return None


def _schedule(options):
    """TRL's arguments where any is given, the others at TRL's defaults; None without."""
    from dentropy.experiment.sampled_by import Schedule

    accumulation, generation, iterations = (getattr(options, name) for name in TRL)
    if accumulation is generation is iterations is None:
        return None
    accumulation = 1 if accumulation is None else accumulation
    return Schedule(
        steps_per_generation=accumulation if generation is None else generation,
        num_iterations=1 if iterations is None else iterations,
        accumulation=accumulation,
    )
