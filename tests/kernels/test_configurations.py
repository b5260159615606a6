"""Which shapes which device gets. That they fit it is shown by test_compilation.py."""

from types import SimpleNamespace

import pytest
import torch
from dentropy.kernels import configurations
from dentropy.kernels.configurations import ATTENTION, ATTENTION_TANGENT, HEAD, Hardware

DEVICE = torch.device("cuda", 0)
KIB = 1024


@pytest.mark.parametrize(
    "capability, shared_memory, want",
    [
        ((7, 5), 64, "least"),
        ((8, 0), 163, "ampere"),
        ((8, 6), 99, "ampere"),
        ((8, 9), 99, "ampere"),
        ((9, 0), 227, "hopper"),
        ((10, 0), 227, "blackwell"),
        ((12, 0), 99, "ampere"),
    ],
)
def test_a_device_gets_what_it_has_room_for(monkeypatch, capability, shared_memory, want):
    properties = dict(zip(("major", "minor"), capability), shared_memory_per_block_optin=shared_memory * KIB)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(configurations, "hardware", configurations.hardware.__wrapped__)  # nothing remembered
    assert configurations.generation(DEVICE) == want
    assert configurations.has_descriptors(DEVICE) or capability < (9, 0)


@pytest.mark.parametrize("hip, device", [("6.0", DEVICE), (None, torch.device("cpu"))])
def test_what_is_not_nvidias_gets_the_least(monkeypatch, hip, device):
    monkeypatch.setattr(torch.version, "hip", hip)
    assert configurations.hardware.__wrapped__(device) == Hardware(0, 64)


@pytest.mark.parametrize("generation", ["hopper", "blackwell", "ampere", "least"])
@pytest.mark.parametrize("table", [ATTENTION, ATTENTION_TANGENT])
def test_every_head_size_has_blocks_on_every_device(monkeypatch, table, generation):
    monkeypatch.setattr(configurations, "generation", lambda device: generation)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for sizes in ((1, 1), (64, 64), (80, 24), (96, 96), (128, 192), (256, 256)):
            q, v = (torch.empty(1, 1, size, dtype=dtype) for size in sizes)
            blocks = configurations.attention_blocks(table, q, v)
            # Keys up to the block's first query are walked without masks.
            assert blocks.queries % blocks.keys == 0 and blocks.keys >= 16


@pytest.mark.parametrize("generation", HEAD)
def test_rows_that_are_not_aligned_get_small_tiles(monkeypatch, generation):
    monkeypatch.setattr(configurations, "generation", lambda device: generation)
    hidden = torch.empty(1, 1, dtype=torch.bfloat16)
    for dhidden, dweight in ((None, None), (hidden, None), (hidden, hidden)):
        held = "nothing" if dhidden is None else "hidden" if dweight is None else "more"
        for aligned, want in ((True, generation), (False, "least")):
            assert configurations.head_tile(hidden, dhidden, dweight, (None, None), aligned) == HEAD[want][held]
    assert configurations.head_tile(hidden, None, None, (hidden, None), True) == HEAD[generation]["more"]
