"""Threads take turns: what one moves, no other sees."""

import threading

import numpy as np
import torch
from models import random_batch, random_direction, random_model

from dentropy import Policy, measure, moved_weights, sample


def together(*tasks) -> list[Exception]:
    """What tasks, run at once in threads, raise."""
    raised, start = [], threading.Barrier(len(tasks))

    def run(task):
        start.wait()
        try:
            task()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_threads_on_one_model_measure_what_one_alone_measures():
    """Through one policy, and through another that wraps the same model, with tangents and without."""
    model = random_model("llama")
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    batch, direction, policies = random_batch(), random_direction(model), (Policy(model), Policy(model))
    settings = [dict(eta=0.05, order=0), dict(eta=0.0, order=0), dict(eta=0.0, order=1)]
    alone = [measure(policies[0], batch, direction, **s).logp for s in settings]
    differences = []

    def task(policy, i):
        for _ in range(5):
            logp = measure(policy, batch, direction, token_budget=30, **settings[i]).logp
            differences.append(np.abs(logp - alone[i]).max())

    raised = together(*(lambda p=p, i=i: task(p, i) for p in policies for i in range(3)))
    assert not raised and len(differences) == 30 and max(differences) < 1e-4
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


def test_sampling_waits_for_weights_that_are_moved():
    policy = Policy(random_model("llama"))
    direction = random_direction(policy.model)
    draw = dict(prompts=[[3, 4]], per_prompt=4, max_new_tokens=6, seed=1)
    expected, drawn, moved, done = sample(policy, **draw), [], threading.Event(), threading.Event()

    def moving():
        with moved_weights(policy, direction, eta=2.0):
            moved.set()
            done.wait(0.5)

    def sampling():
        moved.wait()
        drawn.append(sample(policy, **draw))
        done.set()

    assert not together(moving, sampling)
    assert torch.equal(drawn[0].tokens, expected.tokens)


def test_passes_of_different_models_do_not_meet():
    """The level of forward mode is the process's: two at once would be one inside the other."""
    batch, models = random_batch(), [random_model("llama", seed) for seed in (0, 1)]
    pairs = [(Policy(model), random_direction(model)) for model in models]
    alone = [measure(*(policy, batch, direction)).dlogp for policy, direction in pairs]
    found = [[], []]

    def task(i):
        for _ in range(5):
            found[i].append(measure(pairs[i][0], batch, pairs[i][1], token_budget=30).dlogp)

    assert not together(lambda: task(0), lambda: task(1))
    for i in (0, 1):
        assert all(np.abs(x - alone[i]).max() < 1e-4 * np.abs(alone[i]).max() for x in found[i])
