"""What trainers write, one file per format: each makes its rows those that `dentropy.rollouts.readers` reads."""
