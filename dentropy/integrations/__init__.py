"""What hooks into trainers: `transformers` holds the callback for transformers.Trainer and TRL's GRPO and RLOO.

It may import everything but `dentropy.demo`, `dentropy.examples` and `dentropy.cli`. The work of a step is in
`dentropy.experiment.step_watch`, which a plain loop uses too.
"""
