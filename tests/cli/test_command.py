import os
import subprocess
import sys

import pytest
from commands import DIRECTION, completed

from dentropy import __version__
from dentropy.cli import main


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["probe", "--help"], ["sample", "--help"]):
        with pytest.raises(SystemExit) as leave:
            main(arguments)
        assert leave.value.code == 0
    assert capsys.readouterr().out.startswith(f"dentropy {__version__}\nusage: dentropy ")


def test_the_command_itself_in_a_process_of_its_own(tmp_path):
    """One good and one bad run: warnings, progress and errors of libraries would show here."""
    command = [sys.executable, "-c", "import sys; from dentropy.cli import main; sys.exit(main())"]

    def run(text):
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run([*command, *completed(text)], capture_output=True, text=True, env=environment)

    bad = run(f"{DIRECTION} --policy broken")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    good = run(f"{DIRECTION} --out {tmp_path}/run")
    assert good.returncode == 0 and "warning" not in good.stderr.lower()
    assert (tmp_path / "run" / "results.json").exists() and "Files in" in good.stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from dentropy.cli import parser; parser();"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'matplotlib', 'triton')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
