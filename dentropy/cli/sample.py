"""dentropy sample."""

from __future__ import annotations

from pathlib import Path

from dentropy.cli.keeping import write_or_keep
from dentropy.cli.options import LazyTokenizer, add_model_options, load_libraries, loading
from dentropy.cli.processes import ended_by_sigterm
from dentropy.cli.terminal import about, say

MAX_NEW_TOKENS = 512
SETTINGS = ("per_prompt", "temperature", "seed")  # an unfinished draw goes on with the same


def add(commands) -> None:
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
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the unfinished draw of the same command; start anew where there is none",
    )
    add_model_options(command)
    command.set_defaults(run=run)


def run(options) -> None:
    from dentropy.experiment.identity import draw_identity
    from dentropy.experiment.progress import rollout_bar
    from dentropy.experiment.resumable import check_unfinished, unfinished_run
    from dentropy.model.policy import Policy
    from dentropy.rollouts.sampling import read_prompts, sample

    if options.top_p != 1.0 or options.top_k != 0:
        raise ValueError(
            f"--top-p {options.top_p:g}, --top-k {options.top_k}: expected both off (1.0 and 0): rollouts "
            "cut by them come from another distribution than the one entropy and weights are of"
        )
    out = _new_file(options.out)
    check_unfinished(out, options.resume)
    load_libraries()
    tokenizer = LazyTokenizer(options.policy, options.trust_remote_code)
    with about("--prompts"):
        prompts = read_prompts(options.prompts, tokenizer)
    with about("--policy"):
        policy = Policy.from_pretrained(options.policy, **loading(options))
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = _what_fits(policy, prompts)
    settings = {name: getattr(options, name) for name in SETTINGS} | {"max_new_tokens": max_new_tokens}
    with ended_by_sigterm(), unfinished_run(out, draw_identity(policy, prompts, settings)) as store:
        with rollout_bar("sampling", len(prompts) * options.per_prompt) as progress:
            batch = sample(policy, prompts, **settings, progress=progress, store=store)
        out = write_or_keep(lambda path: _write(batch, path, tokenizer.loaded), out, "dentropy-rollouts", ".jsonl")
    say(f"{len(batch):,} rollouts of {batch.n_groups:,} prompts, {batch.n_tokens:,} tokens: {out}")


def _what_fits(policy, prompts: list[list[int]]) -> int:
    """MAX_NEW_TOKENS, or what the policy's positions leave; 1 where they leave none, for `sample` to refuse by name."""
    if policy.max_positions is None:
        return MAX_NEW_TOKENS
    return max(1, min(MAX_NEW_TOKENS, policy.max_positions - max(map(len, prompts))))


def _new_file(path: str) -> Path:
    """`path`, if a new file can be written there, by trying."""
    out = Path(path)
    try:
        _claim(out)
        out.unlink()
    except OSError as error:
        raise ValueError(
            f"--out: {out} cannot be written, expected a new file in a folder that can ({error})"
        ) from error
    return out


def _claim(out: Path) -> None:
    """Make an empty file where there is none."""
    try:
        open(out, "x").close()
    except FileExistsError as error:
        raise ValueError(f"--out: {out} exists, expected a new file") from error


def _write(batch, out: Path, tokenizer) -> Path:
    """Write the rollouts to a new file: whole, or not at all."""
    from dentropy.experiment.unfinished import temporary

    unfinished = temporary(out.absolute().parent)
    try:
        batch.to_jsonl(unfinished, tokenizer)
        _claim(out)  # what appeared there meanwhile is not replaced
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return out
