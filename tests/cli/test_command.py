import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DIRECTION, completed

from dentropy import __version__
from dentropy.cli import main
from dentropy.experiment.run_folder import load

FIGURES = ["contributions.png", "delta_entropy.png", "weights.png"]
FILES = sorted([*FIGURES, "report.html", "results.json", "rollouts.csv", "rollouts.parquet"])
SAVED = Path(__file__).parents[1] / "experiment" / "schema_1" / "results.json"


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["probe", "--help"], ["sample", "--help"]):
        with pytest.raises(SystemExit) as leave:
            main(arguments)
        assert leave.value.code == 0
    assert capsys.readouterr().out.startswith(f"dentropy {__version__}\nusage: dentropy ")


def test_the_command_itself_in_a_process_of_its_own(tmp_path):
    """Warnings, progress and errors of libraries would show here; everything is written and drawn, without pyplot."""
    code = "import sys; from dentropy.cli import main; sys.exit(main() or 'matplotlib.pyplot' in sys.modules)"
    out = tmp_path / "run"
    command = [sys.executable, "-c", code, *completed(f"{DIRECTION} --out {out}")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and "warning" not in done.stderr.lower()
    assert f"Files in {out}: {', '.join(FILES)}" in done.stdout and sorted(path.name for path in out.iterdir()) == FILES
    assert load(out)["n_sequences"] == 18
    for name in FIGURES:
        picture = (out / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    page = (out / "report.html").read_text()
    assert page.count("<svg") > len(FIGURES) and "predicted ± 2 SE" in page


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["probe", "--help"], ["sample", "--help"]])
def test_version_and_help_need_and_load_nothing_heavy(words):
    """As `python -m dentropy`, in at most half a second of CPU; what is imported is listed by Python itself."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "dentropy", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and done.stdout.startswith(("dentropy ", "usage: dentropy "))
    assert "argparse" in loaded and "dentropy" in loaded
    assert not loaded & {"torch", "triton", "numpy", "transformers", "matplotlib", "scipy", "pandas", "tqdm"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    "text, said",
    [
        ("prob", "; did you mean probe for prob? (see dentropy --help)"),
        ("--verzion", "; did you mean --version for --verzion? (see dentropy --help)"),
        ("probe --rolouts x --polcy=y --etas -1e-6", "; did you mean --rollouts for --rolouts?; did you mean --policy"),
        ("show old_run --jsn", "unrecognized arguments: --jsn; did you mean --json for --jsn? (see dentropy show"),
        ("sample --prompts policy --see 1", "required: --policy, --out (see dentropy sample --help)"),
        ("show old_run --zzz", "unrecognized arguments: --zzz (see dentropy show --help)"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(text, said, capsys):
    """And neither abbreviations, nor values that resemble an option, nor words like none."""
    assert main(text.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_show_json_is_the_content_in_ascii(tmp_path, capsys):
    content = json.loads(SAVED.read_text(encoding="utf-8"))
    content["source"]["policy"] = "\x1b[2J\x7f\x9b\u202eé"
    (tmp_path / "results.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert main(["show", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == content
    assert all(" " <= c <= "~" or c == "\n" for c in printed)


@pytest.mark.parametrize("line, expected", [("dentropy pro", {"probe"}), ("dentropy show --js", {"--json"})])
def test_a_shell_is_told_what_may_come_next(line, expected, tmp_path):
    """By argcomplete's protocol: `eval "$(register-python-argcomplete dentropy)"` sets the same."""
    asked = dict(_ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\n", COMP_LINE=line, COMP_POINT=str(len(line)))
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "answer")
    subprocess.run([sys.executable, "-m", "dentropy"], env=os.environ | asked, check=True)
    assert {word.strip() for word in (tmp_path / "answer").read_text().split()} == expected
