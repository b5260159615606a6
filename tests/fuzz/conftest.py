import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def folder():
    """An empty folder, in memory where the system has such a place: thousands of files pass through it."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)
