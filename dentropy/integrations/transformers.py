"""The flight recorder: what each update of a training run does to the policy's entropy, predicted and measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers import TrainerCallback

from dentropy.doors import reason
from dentropy.experiment.run_folder import ViewsFailedError
from dentropy.experiment.step_watch import VERDICTS, OtherChange, StepWatch
from dentropy.experiment.watched_policy import WatchedPolicy
from dentropy.integrations import next_rollouts
from dentropy.integrations.drawn_by_ranks import drawn_by_ranks
from dentropy.integrations.prompts import PromptSource
from dentropy.integrations.trainer_rewards import TrainerRewards, not_here
from dentropy.passes import ranks
from dentropy.passes.microbatches import AUTO
from dentropy.rollouts.batch import PackedBatch
from dentropy.rollouts.sampling import end_tokens

PREFIX = "dentropy/"
WHOLE_MODELS = ("MULTI_GPU", "MULTI_CPU")  # in every process, as accelerate names it
TOTALS = {"predicted_total": "predicted_delta", "measured_total": "measured_delta"}


class EntropyForecast(TrainerCallback):
    """Records, every few steps of a transformers.Trainer or of TRL's GRPO or RLOO trainer, what the update does.

    Before the optimizer steps, rollouts are drawn from the policy, none of which made the update; the change of entropy
    along the very step that the optimizer is about to take is predicted on them, and measured after it. A recorded step
    is logged, so that there is one entry of `state.log_history` for each, with the keys

        dentropy/entropy                      H̄ before the step, nats per token
        dentropy/slope, slope_stderr          along the step as it is stored, per unit of η, the largest learning rate
        dentropy/slope_intended, _stderr      along the step as it is meant, where told apart from 0
        dentropy/predicted_delta, _stderr     the change of entropy, by slope and curvature
        dentropy/measured_delta, _stderr      after the step, by importance sampling on the same rollouts
        dentropy/ess_fraction, khat           of its weights
        dentropy/verdict                      2 reliable, 1 strained, 0 unusable
        dentropy/noise_floor                  what rounding in measured_delta stays below
        dentropy/realized_fraction            ⟨stored change, intended change⟩ / ‖intended‖²: below 1 where weights of
                                              half precision lose part of the update
        dentropy/length, kl_predicted, kl_measured   tokens per rollout before the step, and KL(before‖after) in nats
                                              per rollout, with _stderr
        dentropy/length_predicted_delta, length_measured_delta   of the step, with _stderr
        dentropy/reward, reward_predicted_delta, reward_measured_delta   the same of the mean reward, in a callback
                                              placed by `attach` in GRPO and RLOO
        dentropy/predicted_total, measured_total   summed over the recorded steps
        dentropy/failed                       records that failed, each with a warning; once there is one

    and, in a callback placed by `attach`, once the trainer has sampled from the new weights for its next step, at the
    next log,

        dentropy/next_batch/step              the step that these rollouts judge
        dentropy/next_batch/measured_delta, _stderr, ess_fraction, verdict   its change of entropy, backwards: weights
                                              from the new weights to the old

    which needs no sampling of its own. Where one batch of rollouts serves several steps, it judges the last before it.
    With earlier=True there is with each record but the first

        dentropy/earlier/step                 the record before, whose rollouts these are
        dentropy/earlier/measured_delta, _stderr, ess_fraction, verdict   the change by them, reweighted

    as what the policy of that time gave their tokens is known. Those of the trainer's earlier batches judge no step:
    the policy was made from them.
    A number that is not there (a standard error from one prompt, a slope where the learning rate is 0) has no key.

    Training goes on as without it, bit for bit: weights, optimizer state, random states, gradients, buffers, training
    mode and attention setting. Half-precision weights are measured on float32 copies; a warning says before the first
    step what these need. The trainer's reward functions are called at every record, with its columns and its state,
    for the forecast of the reward; a function that keeps a state of its own, such as a generator, sees these calls:
    rewards=False spares it. A warning says where there is no such forecast: with models or async functions as rewards,
    tools, rollout_func and `prompts`.

    Under DistributedDataParallel each process draws its part of the rollouts and runs its part of the passes; all of
    them log the same numbers. The first one calls the reward functions, for all rollouts, and writes the run folders.

    Args:
        every: steps from one record to the next; the first step is always recorded.
        prompts: what rollouts answer: texts, chat messages or lists of token ids. None means the column "prompt" of the
            training data, as in GRPO and RLOO.
        n_prompts, per_prompt: prompts drawn at random for a record, and rollouts of each.
        max_new_tokens: of a rollout; None means the trainer's max_completion_length.
        temperature: of sampling; None means the trainer's, 1 where it has none.
        report_every: records from one run folder (report, attribution, numbers, figures) to the next; 0 for none.
        folder: where they go, as step-000100; None means "dentropy" in the trainer's output_dir.
        seed: of the generator that draws prompts and rollouts, the callback's own.
        rewards: whether the trainer's reward functions are called.
        earlier: whether the rollouts of the record before judge a step too: two more passes, and no sampling.
        token_budget: as in `measure`.

    Raises:
        ValueError: counts below 1. When training begins: under several processes that share the model out among them
            (FSDP, DeepSpeed, tensor parallel), without prompts or max_new_tokens, and in float16 without clipping,
            where gradients still carry the scaler's factor. At the first record: what `Policy`, `measure` and
            `Direction.from_optimizer_step` refuse. Later records that fail are warned of and counted, and training goes
            on.

    Example:
        >>> EntropyForecast(every=5).every
        5
    """

    def __init__(
        self,
        every: int = 10,
        *,
        prompts: Sequence | None = None,
        n_prompts: int = 32,
        per_prompt: int = 4,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        report_every: int = 10,
        folder: str | Path | None = None,
        seed: int = 0,
        rewards: bool = True,
        earlier: bool = False,
        token_budget: int | str = AUTO,
    ):
        for name, count, least in (
            ("every", every, 1),
            ("n_prompts", n_prompts, 1),
            ("per_prompt", per_prompt, 1),
            ("report_every", report_every, 0),
        ):
            if count < least:
                raise ValueError(f"{name}: {count}, expected at least {least}")
        self.every, self.n_prompts, self.per_prompt, self.report_every = every, n_prompts, per_prompt, report_every
        self.seed, self.folder, self.rewards, self.token_budget = seed, folder, rewards, token_budget
        self.earlier = earlier
        self._prompts, self._max_new_tokens, self._temperature = prompts, max_new_tokens, temperature
        self._trainer = None
        self._forget()

    @classmethod
    def attach(cls, trainer, *args, **settings) -> Self:
        """A new EntropyForecast(*args, **settings) in a trainer, before its other callbacks, so that trackers
        (report_to) get the keys, and with the trainer's next rollouts at hand. ValueError where there is one."""
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(callback, cls) for callback in callbacks):
            raise ValueError(f"trainer: it has an {cls.__name__}, expected none before attach")
        callback = cls(*args, **settings)
        callback._trainer = trainer
        callbacks.insert(0, callback)
        return callback

    def _forget(self) -> None:
        """What belongs to one run of train()."""
        self._watched = self._source = self._rewards = self._step = self._past = self._earlier = None
        self._ready: dict[str, float] = {}
        self._totals = dict.fromkeys(TOTALS, 0.0)
        self._recorded = self._failed = 0
        self._log_now = self._judges = False

    def on_train_begin(self, args, state, control, *, processing_class=None, train_dataloader=None, **_):
        from accelerate.state import AcceleratorState  # every Trainer brings it, the class alone does not

        self._forget()
        if args.world_size > 1 and (kind := AcceleratorState().distributed_type.value) not in WHOLE_MODELS:
            raise ValueError(
                f"EntropyForecast: {args.world_size} processes as {kind}, expected one process, or several with "
                "the whole model each (DistributedDataParallel)"
            )
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "EntropyForecast: float16 without clipping, whose gradients still carry the scaler's factor before the "
                "step, expected max_grad_norm, bf16 or float32"
            )
        if self._max_new_tokens is None and getattr(args, "max_completion_length", None) is None:
            raise ValueError(f"max_new_tokens: not given, and {type(args).__name__} has no max_completion_length")
        template = getattr(args, "chat_template_kwargs", None)
        dataset = getattr(train_dataloader, "dataset", None)
        self._source = PromptSource(self._prompts, dataset, processing_class, template)
        why_not = next_rollouts.not_the_policys(args)
        self._judges = why_not is None and self._trainer is not None
        if why_not is not None and next_rollouts.buffered(self._trainer) is not None:
            warnings.warn(f"EntropyForecast: the trainer's rollouts judge no step: {why_not}", stacklevel=2)
        if self.rewards and getattr(self._trainer, "reward_funcs", None):
            self._rewards = self._trainer_rewards()
        for entry in state.log_history:  # of the run that is resumed
            self._totals |= {name: entry[PREFIX + name] for name in TOTALS if PREFIX + name in entry}

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, processing_class=None, **_):
        number = state.global_step + 1
        self._look_back_by_next(args)
        self._step = None
        if self._recorded and number % self.every:
            return
        optimizer = _inner(optimizer)
        with self._going_on(number):
            _check_gradients(optimizer)
            if self._watched is None:
                self._watched = WatchedPolicy(model, optimizer)
            batch = self._rollouts(args, number, processing_class)
            step = StepWatch(self._watched, optimizer, batch, token_budget=self.token_budget)
            self._step = step
            if self.report_every and (self._recorded + 1) % self.report_every == 0:
                self._save(step, number, Path(self.folder or Path(args.output_dir, "dentropy")), processing_class)

    def on_optimizer_step(self, args, state, control, **_):
        step, self._step = self._step, None
        if step is None:
            return
        number = state.global_step + 1
        with self._going_on(number):
            step.look_back()
            numbers = step.numbers()
            for total, name in TOTALS.items():
                self._totals[total] += numbers[name]
            self._ready |= numbers | self._totals
            self._recorded += 1
            self._log_now = True
            if self._judges:
                self._past = number, step, next_rollouts.buffered(self._trainer)
            if self.earlier:
                self._look_back_by_earlier(number, step)

    def on_step_end(self, args, state, control, **_):
        if self._log_now:
            control.should_log, self._log_now = True, False
        return control

    def on_log(self, args, state, control, *, logs=None, **_):
        if not self._ready or logs is None or "loss" not in logs:  # evaluations and summaries are logged too
            return
        found = {PREFIX + name: value for name, value in self._ready.items()}
        if self._failed:
            found[f"{PREFIX}failed"] = self._failed
        logs.update(found)  # for the callbacks that come after
        state.log_history[-1].update(found)
        self._ready = {}

    def on_train_end(self, args, state, control, **_):
        self._watched = self._step = self._past = self._earlier = None

    def _rollouts(self, args, number: int, processing_class) -> PackedBatch:
        """Rollouts of the policy as it is, to prompts of the training data: others than the trainer's, by a generator
        that belongs to this step."""
        generator = np.random.default_rng([self.seed, number])
        prompts, rows = self._source.draw(self.n_prompts, generator)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        with self._watched.policy() as policy:
            ends = {*end_tokens(policy), getattr(tokenizer, "eos_token_id", None)} - {None}
            settings = dict(
                per_prompt=self.per_prompt,
                max_new_tokens=self._max_new_tokens or args.max_completion_length,
                temperature=self._temperature_of(args),
                seed=int(generator.integers(2**31)),
                eos_token_id=sorted(ends),
            )
            batch = drawn_by_ranks(policy, prompts, **settings)
            return batch if self._rewards is None else self._with_rewards(batch, rows)

    def _trainer_rewards(self) -> TrainerRewards | None:
        why_not = "prompts= are not the training data's" if self._prompts is not None else None
        why_not = why_not or not_here(self._trainer, self._source.first())
        return TrainerRewards(self._trainer) if why_not is None else self._no_rewards(why_not)

    def _no_rewards(self, why_not: str) -> None:
        self._rewards = None
        warnings.warn(f"EntropyForecast: no forecast of the reward: {why_not}", stacklevel=4)

    def _with_rewards(self, batch: PackedBatch, rows: list[dict]) -> PackedBatch:
        reward = ranks.exchange(self._rewards.of(batch, rows) if ranks.rank() == 0 else None)[0]
        if np.isnan(reward).any():
            self._no_rewards(f"its functions give None for {np.isnan(reward).sum()} of {len(batch)} rollouts")
            return batch
        return replace(batch, reward=reward)

    def _temperature_of(self, args) -> float:
        return getattr(args, "temperature", 1.0) if self._temperature is None else self._temperature

    def _look_back_by_next(self, args) -> None:
        """The step before, judged by what the trainer has sampled since, if it has."""
        past, self._past = self._past, None
        if past is None:
            return
        number, step, known = past
        buffer = next_rollouts.buffered(self._trainer)
        if buffer is None or buffer is known:
            return
        with self._going_on(number):
            batch = next_rollouts.packed(buffer, self._temperature_of(args))
            if batch is None:
                return
            self._ready |= _named("next_batch", number, step.look_back_by(batch))

    def _look_back_by_earlier(self, number: int, step: StepWatch) -> None:
        """This step, judged by the rollouts of the record before."""
        earlier, self._earlier = self._earlier, (number, step.as_sampled())
        if earlier is not None:
            self._ready |= _named("earlier", earlier[0], step.look_back_by(earlier[1]))

    def _save(self, step: StepWatch, number: int, folder: Path, processing_class) -> None:
        """The run folder of this step; a number is put behind a name that is taken."""
        result = step.report()
        if result is None or ranks.rank() > 0:
            return
        result = replace(result, seeds={"rollouts": self.seed}, source={"update": f"step {number} of a training run"})
        names = (f"step-{number:06d}{tail}" for tail in ("", *(f"-{again}" for again in range(2, 10000))))
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        result.save(next(folder / name for name in names if not (folder / name).exists()), tokenizer)

    @contextmanager
    def _going_on(self, number: int) -> Iterator[None]:
        """Training outlives a record that fails, with a warning, but for the first one: then the set-up is wrong. What
        fails on one rank fails on all."""
        try:
            with ranks.in_step():
                yield
        except (ValueError, MemoryError, OSError, ViewsFailedError, _NotFinite) as error:
            if not self._recorded and not isinstance(error, _NotFinite):
                raise
            self._failed += 1
            warnings.warn(f"EntropyForecast: the record of step {number} failed: {reason(error)}", stacklevel=3)


def _named(judge: str, number: int, found: OtherChange) -> dict[str, float]:
    """What other rollouts than the record's say, under the judge's name; `number` is the step that belongs to them."""
    numbers = {"step": number, "measured_delta": found.delta, "ess_fraction": found.ess_fraction}
    numbers |= {"verdict": VERDICTS[found.verdict]}
    numbers |= {} if found.stderr is None else {"measured_delta_stderr": found.stderr}
    return {f"{judge}/{name}": float(value) for name, value in numbers.items()}


class _NotFinite(Exception):
    """A step that the trainer's scaler leaves out, or that ends the run: nothing to foresee."""


def _check_gradients(optimizer: torch.optim.Optimizer) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        raise _NotFinite("gradients are not finite")


def _inner(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
