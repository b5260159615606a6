"""The GPU path, proven on the card at hand: kernel tests, end-to-end tests, benchmarks, rooflines, in minutes.

    python bench/prove.py --minutes 10           # needs a GPU; no network, and dentropy need not be installed
    python bench/prove.py --collect              # what it would do, anywhere
    python bench/prove.py --dry-run              # the same on a CPU at tiny sizes: whether it would run

Steps run in order of importance until the time is up; each is written to OUT/prove.json (and said) as it finishes, and
what there was no time for says so. The last output is a table of at most 60 lines. It exits with 1 where a test failed
or one of dentropy's own figures is missing; that a goal is missed is in the table.

What can be brought along:

- Compiled kernels: set TRITON_CACHE_DIR to a folder that an earlier run filled on the same kind of card with the same
  versions of Triton and PyTorch. Without it the first calls take seconds each.
- Peers, as wheels: `pip download --no-deps -d wheels NAME ...` where there is a network, `pip install --no-index
  --no-deps wheels/*` on the card. The modules that are looked for: liger_kernel, cut_cross_entropy, verl, flash_attn,
  quack, jvp_flash_attention. One that is not there is a row that says so.

Needs torch, triton, transformers, numpy, scipy and pytest; some tests skip without the other packages of
"dentropy[test]".
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from plan import STEPS, Case, Checks
from verdict import table, verdict

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("worker.py")
CASE_SECONDS = 150  # for one case at most
LEFT_OUT_OF_DRY_RUNS = {"torch.compile, closed form": "a dry run compiles nothing"}
NO_TIME = "no time was left"


class Proof:
    """The steps that ran, and what there is to say of them; written whole after each."""

    def __init__(self, out: Path, minutes: float, dry: bool):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry, self.deadline = out, dry, time.monotonic() + 60 * minutes
        self.steps = {step.name: {"not_run": NO_TIME} for step in STEPS if _arguments(step, dry) is not None}
        self.content = dict(minutes=minutes, dry_run=dry, machine={}, steps=self.steps)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, name: str, found: dict) -> None:
        self.steps[name] = found
        said = found.get("failed") or found.get("not_run") or found.get("said", "done")
        print(f"{name}: {said} ({found.get('seconds', 0):.0f} s)", flush=True)
        self.write()

    def write(self) -> None:
        self.content |= verdict(self.steps)
        part = self.out / "prove.json.part"
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.out / "prove.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="the time there is (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("proof"), help="folder to write to (default: proof)")
    parser.add_argument("--collect", action="store_true", help="only list the steps")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    asked = parser.parse_args(arguments)
    if not asked.minutes > 0:
        parser.error(f"--minutes: {asked.minutes:g}, expected more than 0")
    if asked.collect:
        print("\n".join(collected()))
        return 0
    missing = [name for name in ("torch", "triton", "transformers", "scipy", "pytest") if find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)}: not installed")
    if not asked.dry_run and not _has_gpu():
        parser.error("PyTorch finds no GPU here; --collect and --dry-run need none")
    proof = Proof(asked.out.resolve(), asked.minutes, asked.dry_run)
    with importable() as environment:
        if asked.dry_run:
            environment |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        run_all(proof, environment)
    proof.write()
    print("\n".join(table(proof.content)))
    print(f"all of it: {proof.out / 'prove.json'}")
    return int(bool(proof.content["failures"]))


def collected() -> Iterator[str]:
    for step in STEPS:
        if isinstance(step, Checks):
            yield f"{step.name}: pytest {' '.join(step.full)} (at most {step.minutes:g} min)"
        else:
            goals = "".join(f"; goal: {goal.what}" for goal in step.goals)
            yield f"{step.name}: {step.function}({', '.join(f'{k}={v}' for k, v in step.full.items())}){goals}"


def run_all(proof: Proof, environment: dict) -> None:
    """Checks one by one; of cases those that follow each other in one process, for each start takes seconds."""
    waiting = [i for i, step in enumerate(STEPS) if _arguments(step, proof.dry) is not None]
    while waiting and proof.seconds_left() > 0:
        if isinstance(STEPS[waiting[0]], Checks):
            step = STEPS[waiting.pop(0)]
            proof.record(step.name, run_tests(step, proof, environment))
            continue
        together = []
        while waiting and isinstance(STEPS[waiting[0]], Case):
            together.append(waiting.pop(0))
        run_cases(together, proof, environment)


def run_tests(step: Checks, proof: Proof, environment: dict) -> dict:
    """How many tests passed, and which failed; of tests that were stopped, what they had said until then."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        *_arguments(step, proof.dry),
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", "addopts=--import-mode=importlib", "-m", "not slow"]
    log, start = proof.out / f"{step.name.replace(' ', '_').replace('*', '')}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        ended = _wait(process, min(60 * step.minutes, proof.seconds_left()))
    return of_pytest(log.read_text(encoding="utf-8"), process.returncode if ended else None) | dict(
        seconds=time.monotonic() - start
    )


def of_pytest(text: str, code: int | None) -> dict:
    """code: that pytest ended with; None where it was stopped."""
    outcomes = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", text, re.MULTILINE)
    failures = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", text, re.MULTILINE)))
    bad = outcomes.count("FAILED") + outcomes.count("ERROR")
    said = f"{outcomes.count('PASSED')} passed, {bad} failed, {outcomes.count('SKIPPED')} skipped"
    if code is None:
        said += ", then its time was up"
    found = dict(said=said, passed=outcomes.count("PASSED"), failures=failures)
    if bad:
        found["failed"] = f"{said}: {'; '.join(failures)}"
    elif code not in (0, None):
        found["failed"] = f"{said}; pytest ended with {code}: {' '.join(text.split()[-30:])}"
    return found


def run_cases(indices: list[int], proof: Proof, environment: dict) -> None:
    """In a worker, and in a new one after a case that took the worker, or the GPU, down. A peer that did is left out
    from then on, and its case repeated."""
    left_out = dict(LEFT_OUT_OF_DRY_RUNS) if proof.dry else {}
    while indices and proof.seconds_left() > 0:
        lines = proof.out / "cases.jsonl"
        lines.write_text("", encoding="utf-8")
        request = json.dumps(dict(cases=indices, tiny=proof.dry, left_out=left_out))
        with (proof.out / "cases.log").open("a", encoding="utf-8") as log:
            command = [sys.executable, WORKER, lines, request]
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        ended = "its process ended early"
        for line in followed(process, lines, proof):
            if "machine" in line:
                proof.content["machine"] = line["machine"]
            elif "stopped" in line:
                ended = line["stopped"]
            elif "ends" in line:
                provider, why = line.pop("lost", (None, None))
                if provider is not None and not provider.startswith("dentropy"):
                    left_out[provider] = f"took the GPU down: {why}"
                else:
                    proof.record(STEPS[line.pop("ends")].name, line)
                    indices = indices[1:]
                ended = None
            else:
                ended = "its process ended early"
        if ended is not None and indices:
            proof.record(STEPS[indices.pop(0)].name, {"not_run" if ended == NO_TIME else "failed": ended})


def followed(process, lines: Path, proof: Proof) -> Iterator[dict]:
    """What a worker says, as it says it, until it ends, or is stopped: for a case that takes too long, or for the time
    being up."""
    read, heard = 0, time.monotonic()
    while True:
        running = process.poll() is None  # asked before reading, so that nothing is missed
        whole = lines.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        for line in whole[read:]:
            heard = time.monotonic()
            yield json.loads(line)
        read = len(whole)
        if not running:
            return
        if proof.seconds_left() < 0 or time.monotonic() - heard > CASE_SECONDS:
            _stop(process)
            yield {"stopped": NO_TIME if proof.seconds_left() < 0 else f"stopped after {CASE_SECONDS} s"}
            return
        time.sleep(0.2)


def _wait(process, seconds: float) -> bool:
    """Whether the process ended within that time; else it is stopped."""
    try:
        process.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        _stop(process)
        return False
    return True


def _stop(process) -> None:
    """With all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _arguments(step: Checks | Case, dry: bool):
    return step.tiny if dry else step.full


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def importable() -> Iterator[dict]:
    """An environment for child processes in which this checkout is `dentropy`, whether or not it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "dentropy")
        package.mkdir()
        for path in (*(ROOT / "dentropy").iterdir(), ROOT / "kernels"):
            if path.name != "__pycache__":
                (package / path.name).symlink_to(path)
        paths = [folder, str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
        # Safe: else Python looks into the working directory first, where `dentropy` is without its kernels.
        yield os.environ | dict(
            PYTHONPATH=os.pathsep.join(filter(None, paths)), PYTHONSAFEPATH="1", PYTHONUNBUFFERED="1"
        )


if __name__ == "__main__":
    sys.exit(main())
