import json
import os

import numpy as np
import pytest

from dentropy.doors import is_refusal, json_value, regular_file, third_party
from dentropy.rollouts import batch, columns


def test_whatever_a_library_raises_is_one_line_that_names_the_step():
    for error in (KeyError("nope"), ImportError("no kernels"), RuntimeError("two\nlines"), RecursionError("deep")):

        def fails(error=error):
            raise error

        with (
            pytest.raises(ValueError, match="^policy: not loaded .*, expected one$") as found,
            third_party("policy: not loaded", "one"),
        ):
            fails()
        assert is_refusal(found.value) and found.value.__cause__ is error and "\n" not in str(found.value)


def test_our_own_code_that_the_library_calls_back_keeps_its_error():
    def library(callback, *arguments):
        return callback(*arguments)

    with pytest.raises(ValueError, match="^nowhere: no such file"), third_party("policy: not loaded", "one"):
        library(regular_file, "nowhere", "a file")
    with pytest.raises(TypeError), third_party("policy: not loaded", "one"):
        library(batch.PackedBatch.from_padded, *[[[[1]]]] * 2, 3, None)  # fails in a frame of ours


@pytest.mark.parametrize("passes", [KeyboardInterrupt, MemoryError])
def test_what_is_no_failure_of_the_library_passes(passes):
    with pytest.raises(passes), third_party("policy: not loaded", "one"):
        raise passes


def test_only_a_raise_of_our_own_is_a_refusal():
    with pytest.raises(ValueError, match="expected a positive number") as error:
        columns.checked_temperature(-1)
    assert is_refusal(error.value)
    for bug in (lambda: int("x"), lambda: np.zeros(2) + np.zeros(3)):
        with pytest.raises(ValueError, match="invalid literal|could not be broadcast") as error:
            bug()
        assert not is_refusal(error.value)
    with pytest.raises(ValueError, match="invalid literal") as error:  # out of int(), in a line of ours
        batch.PackedBatch.from_padded([[[1, 1]]], [[[1, 1]]], ["x"], [[1]])
    assert not is_refusal(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "is not a regular file"), ("none", "no such file"), ("", "is a folder")):
        with pytest.raises(ValueError, match=f"{said}, expected a file of JSON lines"):
            regular_file(tmp_path / name, "a file of JSON lines")


def test_json_too_deep_or_too_long_is_refused_by_name():
    for text in ("[" * 100_000, "1" * 10_000, b"\xff", "{"):
        with pytest.raises(ValueError, match=r"^x\.json: broken JSON \(.*\), expected an object$") as error:
            json_value(text, "x.json")
        assert is_refusal(error.value)
    assert json_value(b"\xef\xbb\xbf{}", "x.json") == json.loads("{}")
