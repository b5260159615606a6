"""What TRL calls the folders and files of a run: checkpoint-N after N steps, and of step N, which it counts before it
takes it, the log completions_N."""

import re

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
COMPLETIONS = re.compile(r"completions_(\d+)\.(?:parquet|jsonl)")
