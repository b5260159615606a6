import re
import time

from dentropy.experiment.progress import rollout_bar, token_bar


def test_progress_shows_the_rate_and_the_time_left(capsys):
    for bar, step in ((token_bar("passes", 1000), (100,)), (rollout_bar("sampling", 10), (1, 100))):
        with bar as progress:
            for _ in range(5):
                time.sleep(0.11)
                progress(*step)
        shown = capsys.readouterr().err.split("\r")[-3]
        assert re.search(r"50%.* tokens/s", shown) and "<00:0" in shown, shown
    with token_bar("passes", 1000):
        pass
    assert capsys.readouterr().err == ""
