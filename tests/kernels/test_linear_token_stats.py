"""The fused head against PyTorch's own derivatives of log_softmax and entropy of the logits that it never stores.

Through the interpreter tiles are so small that every dimension has several, the last of them a piece of one.
"""

import math
import weakref

import numpy as np
import pytest
import torch
from crosses import crossed
from dentropy.kernels import configurations, segments
from dentropy.kernels import linear_token_stats as head
from truth import plain_pytorch, scales

from dentropy import TokenStats, linear_token_stats

on_gpu = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not on_gpu, reason="about the compiled kernel")
needs_interpreter = pytest.mark.skipif(on_gpu, reason="about tiles that this device does not take")
FULL = {name: getattr(head, name) for name in ("SEGMENTS", "GROUP", "ROWS_PER_LAUNCH")}
SMALL = dict(SEGMENTS=3, GROUP=2, ROWS_PER_LAUNCH=128)
FULL_TILES, SMALL_TILE = configurations.HEAD["least"], configurations.Tile(16, 32, 16, 4, 2)
# Blocks: rows 16, 16 and 5, so a group of two and a part of one; seven of the vocabulary in segments of 3, 3 and 1.
N, V, D = (37, 203, 40) if not on_gpu else (2500, 70_003, 1000)
LARGEST = configurations.HEAD["hopper"]["nothing"]
BLOCK = SMALL_TILE.columns if not on_gpu else LARGEST.columns
DEPTH = SMALL_TILE.depth if not on_gpu else LARGEST.depth
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOVING = {
    "nothing": (),
    "hidden": ("dhidden",),
    "head": ("dweight",),
    "both": ("dhidden", "dweight"),
    "bias": ("dbias",),
    "all": ("dhidden", "dweight", "dbias"),
}
UNIT = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if not on_gpu:
        for name, size in SMALL.items():
            monkeypatch.setattr(head, name, size)
        monkeypatch.setitem(configurations.HEAD, "least", dict.fromkeys(FULL_TILES, SMALL_TILE))


@pytest.fixture
def launches(monkeypatch):
    """The keyword arguments of every launch of the kernel that makes the products."""
    seen, kernel = [], head._linear_states_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(options) or kernel[grid](*args, **options)

    monkeypatch.setattr(head, "_linear_states_kernel", Spy())
    return seen


@pytest.fixture
def draw(device):
    """draw(*moving, rows, vocabulary, depth, dtype, bias) -> the arguments, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*moving, rows=N, vocabulary=V, depth=D, dtype=torch.float32, bias=False):
        # Logits of spread 2 and derivatives of spread 1 to 2, whatever the depth.
        sizes = {
            "hidden": (rows, depth, 1.0),
            "weight": (vocabulary, depth, 2.0),
            "dhidden": (rows, depth, 0.5),
            "dweight": (vocabulary, depth, 1.0),
            "bias": (vocabulary, 1, 1.0),
            "dbias": (vocabulary, 1, 1.0),
        }
        inputs = {}
        for name in ("hidden", "weight", *moving, *["bias"] * bias):
            height, width, size = sizes[name]
            values = torch.randn(height, width, generator=generator)
            if "weight" in name:
                values *= size / math.sqrt(max(width, 1))
            else:
                values *= size
            inputs[name] = (values[:, 0] if "bias" in name else values).to(device, dtype)
        inputs["targets"] = torch.randint(vocabulary, (rows,), generator=generator).to(device)
        return inputs

    return draw


def run(hidden, weight, targets, *args, **options):
    return TokenStats(*head.linear_token_stats(hidden, weight, targets, *args, **options))


def fields_of(stats):
    return torch.stack([field for field in stats if field is not None])


def logits_and_tangent(dtype, hidden, weight, dhidden=None, dweight=None, bias=None, dbias=None, targets=None):
    """[logits] or [logits, dlogits], made in `dtype` from inputs upcast to it."""
    h, w, dh, dw, b, db = (t if t is None else t.to(dtype) for t in (hidden, weight, dhidden, dweight, bias, dbias))
    out = [h @ w.T if b is None else h @ w.T + b]
    products = [
        product
        for product in (None if dh is None else dh @ w.T, None if dw is None else h @ dw.T, db)
        if product is not None
    ]
    return out + [sum(products).expand_as(out[0])] if products else out


def assert_as_accurate_as_plain_pytorch(stats, inputs, **transform):
    """Largest error over the rows: at most twice that of PyTorch's float32 product and log_softmax, plus 4 units."""
    targets, exact = inputs["targets"], logits_and_tangent(torch.float64, **inputs)
    truth = plain_pytorch(exact[0], targets, *exact[1:], **transform)
    rounded = logits_and_tangent(torch.float32, **inputs)
    plain = plain_pytorch(rounded[0], targets, *rounded[1:], dtype=torch.float32, **transform)
    scale = scales(truth, *exact, **transform)
    assert [name for name, field in stats._asdict().items() if field is not None] == list(truth)
    for name, want in truth.items():
        got = getattr(stats, name)
        assert got.dtype == torch.float32 and got.shape == want.shape
        error = (got.double() - want).abs().max()
        allowed = 2 * (plain[name].double() - want).abs().max() + 4 * UNIT * scale[name].max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@crossed(lambda moving, dtype: on_gpu or dtype == torch.float32 or moving == "all", moving=MOVING, dtype=DTYPES)
def test_everything_that_can_move_in_every_dtype(draw, moving, dtype):
    inputs = draw(*MOVING[moving], dtype=dtype)
    assert_as_accurate_as_plain_pytorch(run(**inputs), inputs)


@crossed(
    lambda transform, moving: on_gpu or len(transform) == 2 or moving == "all",
    transform=[dict(temperature=0.6), dict(softcap=3.0), dict(softcap=3.0, temperature=1.7)],
    moving=["nothing", "bias", "all"],
)
def test_bias_temperature_and_softcap(draw, moving, transform):
    inputs = draw(*MOVING[moving], bias=True, dtype=torch.bfloat16)
    assert_as_accurate_as_plain_pytorch(run(**inputs, **transform), inputs, **transform)


@pytest.mark.parametrize("rows", [0, 1, 3, 129])
def test_any_number_of_rows(draw, rows):
    inputs = draw("dhidden", rows=rows, vocabulary=2 * BLOCK + 5)
    stats = run(**inputs)
    assert all(field.shape == (rows,) for field in stats[:4])
    if rows:
        assert_as_accurate_as_plain_pytorch(stats, inputs)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_any_vocabulary(draw, vocabulary):
    inputs = draw("dhidden", "dweight", rows=5, vocabulary=vocabulary, dtype=torch.bfloat16, bias=True)
    assert_as_accurate_as_plain_pytorch(run(**inputs), inputs)


@pytest.mark.parametrize("depth", [0, 1, DEPTH - 1, DEPTH, DEPTH + 1])
def test_any_depth(draw, depth):
    inputs = draw("dhidden", "dweight", "dbias", rows=5, vocabulary=BLOCK + 3, depth=depth, bias=True)
    assert_as_accurate_as_plain_pytorch(run(**inputs), inputs)


def in_a_room(tensor, columns, rows=1):
    """The same values as a part of a larger tensor of NaN, `columns` and `rows` - 1 further on in each row."""
    height, width = tensor.shape
    room = torch.full((height * rows, width + columns), math.nan, device=tensor.device, dtype=tensor.dtype)
    view = room[::rows, columns:]
    return view.copy_(tensor)


LAYOUTS = {  # name: whether descriptors take it, and what it makes of a matrix whose rows are multiples of 16 bytes
    "contiguous": (True, lambda t: t),
    "every third row": (True, lambda t: in_a_room(t, 8, rows=3)),
    "rows start between": (False, lambda t: in_a_room(t, 3)),
    "starts between": (
        False,
        lambda t: in_a_room(t, 8).reshape(-1).new_full((t.numel() + 1,), math.nan)[1:].view(t.shape).copy_(t),
    ),
    "transposed": (False, lambda t: t.T.contiguous().T),
    "every second column": (False, lambda t: t.repeat_interleave(2, 1)[:, ::2]),
}


FACTORS = ["hidden", "weight", "dhidden", "dweight"]


@crossed(
    lambda layout, name: on_gpu or (list(LAYOUTS).index(layout) + FACTORS.index(name)) % 2, layout=LAYOUTS, name=FACTORS
)
def test_any_strides_with_descriptors_where_they_fit(draw, launches, layout, name):
    fits, place = LAYOUTS[layout]
    inputs = draw("dhidden", "dweight", rows=19, vocabulary=2 * BLOCK + 5, dtype=torch.bfloat16)
    moved = inputs | {name: place(inputs[name])}
    assert torch.equal(moved[name], inputs[name])
    stats = run(**moved)
    assert [launch["TMA"] for launch in launches] == [fits and configurations.has_descriptors(inputs["hidden"].device)]
    assert_as_accurate_as_plain_pytorch(stats, inputs)


def test_rows_of_an_odd_size_and_vectors_of_any_stride(draw, launches):
    inputs = draw(
        "dhidden", "dweight", "dbias", rows=19, vocabulary=BLOCK + 5, depth=D - 3, dtype=torch.float16, bias=True
    )
    spread = {name: inputs[name].repeat_interleave(3)[::3] for name in ("bias", "dbias", "targets")}
    spread["targets"] = spread["targets"].to(torch.int32)
    stats = run(**inputs | spread)
    assert not launches[0]["TMA"]
    assert_as_accurate_as_plain_pytorch(stats, inputs)


def test_identities_of_a_distribution_that_moves(draw, launches):
    """Over all targets of one token: Σ p = 1, Σ p dlogp = 0, −Σ p logp = h and −Σ p dlogp logp = dh."""
    vocabulary = 2 * BLOCK + 3
    inputs = draw(*MOVING["all"], rows=1, vocabulary=vocabulary, bias=True)
    for name in ("hidden", "dhidden"):
        inputs[name] = inputs[name].expand(vocabulary, -1)
    inputs["targets"] = torch.arange(vocabulary, device=inputs["hidden"].device)
    stats = run(**inputs)
    assert not launches[0]["TMA"]  # rows that are all one row
    logp, h, dlogp, dh = (field.double() for field in stats[:4])
    p = logp.exp()
    for got, want in ((p, 1), (p * dlogp, 0), (-p * logp, h[0]), (-p * logp * dlogp, dh[0])):
        assert got.sum().item() == pytest.approx(float(want), rel=1e-5, abs=2e-6)


def only_from_bias(inputs):
    for name in ("weight", "dweight"):
        inputs[name].zero_()


def uniform(inputs):
    only_from_bias(inputs)
    inputs["bias"].zero_()


def one_hot(inputs, column):
    uniform(inputs)
    inputs["bias"][column] = 50.0


def shifted(inputs):
    inputs["bias"] += 1e3


def peaked(inputs):
    inputs["hidden"] *= 50


def derivative_with_a_common_part(inputs):
    for name in ("dhidden", "dweight"):
        inputs[name] *= 0.01
    inputs["dbias"].mul_(0.01).add_(30)


def target_at(column):
    return lambda inputs: inputs["targets"].fill_(column)


HARD = {
    "uniform": uniform,
    "one-hot at the first token": lambda inputs: one_hot(inputs, 0),
    "one-hot at the last token": lambda inputs: one_hot(inputs, -1),
    "bias + 1000": shifted,
    "peaked": peaked,
    "derivative 30 + noise": derivative_with_a_common_part,
    "target at the first token": target_at(0),
    "target at the last token": target_at(V - 1),
}


@pytest.mark.parametrize("hard", HARD)
def test_hard_rows(draw, hard):
    inputs = draw(*MOVING["all"], rows=5, bias=True)
    HARD[hard](inputs)
    stats = run(**inputs)
    assert_as_accurate_as_plain_pytorch(stats, inputs)
    slack = 2.0**-20
    assert (stats.logp <= 0).all()
    assert (stats.entropy >= -slack).all() and (stats.entropy <= (1 + slack) * math.log(V)).all()


def test_a_constant_derivative_moves_nothing(draw):
    inputs = draw("dbias", rows=5)
    inputs["dbias"].fill_(30.0)
    assert all(field.abs().max() < UNIT for field in run(**inputs)[2:4])


@crossed(
    lambda masked_derivative, softcap: (
        on_gpu or math.isnan(masked_derivative) or (masked_derivative > 1e30) == bool(softcap)
    ),
    masked_derivative=[1e30, math.inf, math.nan],
    softcap=[None, 3.0],
)
def test_a_bias_of_minus_infinity_takes_a_token_out(draw, masked_derivative, softcap):
    inputs = draw(*MOVING["all"], rows=5, bias=True)
    keep = torch.zeros(V, dtype=torch.bool, device=inputs["hidden"].device)
    keep[V // 2 : V // 2 + BLOCK : 2] = True  # nothing of the first segment and the last
    inputs["bias"][~keep], inputs["dbias"][~keep] = -math.inf, masked_derivative
    inputs["targets"] = keep.nonzero()[:, 0][inputs["targets"] % int(keep.sum())]
    kept = {name: tensor[keep] if len(tensor) == V else tensor for name, tensor in inputs.items()}
    kept["targets"] = keep.cumsum(0)[inputs["targets"]] - 1
    assert_as_accurate_as_plain_pytorch(run(**inputs, softcap=softcap), kept, softcap=softcap)
    inputs["targets"][1] = 0  # masked
    stats = run(**inputs, softcap=softcap)
    assert stats.logp[1] == -math.inf and fields_of(stats)[:, [0, 2, 3, 4]].isfinite().all()


def test_a_head_without_tokens_is_nan(draw):
    inputs = draw(*MOVING["all"], rows=5, bias=True)
    inputs["bias"].fill_(-math.inf)
    assert fields_of(run(**inputs)).isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(draw, bad):
    inputs = draw("dhidden", rows=5)
    inputs["hidden"][1, 3] = inputs["dhidden"][2, D - 1] = bad
    stats = fields_of(run(**inputs))
    assert stats[:, [0, 3, 4]].isfinite().all() and stats[:2, 2].isfinite().all()
    assert not stats[:, 1].isfinite().any() and not stats[2:, 2].isfinite().any()


@pytest.mark.parametrize("target", [-1, V, V + 1, -(2**31), 2**31 - 1, 2**40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_target_out_of_range_makes_its_row_nan(draw, target, dtype):
    if target > torch.iinfo(dtype).max:
        return
    inputs = draw("dhidden", rows=3)
    inputs["targets"] = inputs["targets"].to(dtype)
    inputs["targets"][1] = target
    stats = fields_of(run(**inputs))
    assert stats[:, 1].isnan().all() and stats[:, [0, 2]].isfinite().all()
    with pytest.raises(ValueError, match=rf"targets\[1\]: {target}, expected a token id in \[0, {V}\)"):
        linear_token_stats(**inputs, validate=True)


@crossed(
    lambda moving, dtype: on_gpu or moving == "all", moving=["nothing", "all"], dtype=DTYPES if on_gpu else DTYPES[1:2]
)
def test_bits_of_a_row_do_not_depend_on_the_batch_the_launch_or_the_run(draw, launches, monkeypatch, moving, dtype):
    rows = 128 + 3
    inputs = draw(*MOVING[moving], rows=rows, dtype=dtype, bias=True, vocabulary=BLOCK + 5, depth=DEPTH + 3)
    of_rows = [name for name in ("hidden", "dhidden", "targets") if name in inputs]
    if not on_gpu:  # the interpreter's sums are NumPy's, whose order depends on a row's place: exact ones do not care
        for name in inputs.keys() - {"targets"}:
            inputs[name].mul_(16).round_().div_(16)
    monkeypatch.setattr(head, "ROWS_PER_LAUNCH", 128)
    batch = fields_of(run(**inputs))
    assert len(launches) == 2 and batch.isfinite().all()
    monkeypatch.setattr(head, "ROWS_PER_LAUNCH", rows)
    assert torch.equal(fields_of(run(**inputs)), batch)
    assert len(launches) == 3
    for row in (0, 79, rows - 1):
        alone = inputs | {name: inputs[name][row : row + 1] for name in of_rows}
        assert torch.equal(fields_of(run(**alone)), batch[:, row : row + 1])


@pytest.mark.parametrize("rows", [1, 127, 128, 8192, 8193, 20_000, 1_000_001])
def test_launches_cover_the_rows_in_parts_of_nearly_equal_size(monkeypatch, rows):
    monkeypatch.setattr(head, "ROWS_PER_LAUNCH", 8192)
    parts = head._launches(rows)
    sizes = [part.stop - part.start for part in parts]
    assert [parts[0].start, *(part.stop for part in parts[:-1])] == [part.start for part in parts]
    assert parts[-1].stop == rows and max(sizes) <= 8192
    assert all(part.start % 128 == 0 for part in parts) and max(sizes) - min(sizes) < 128 * len(parts)


@pytest.mark.parametrize("moving", ["nothing", "all"])
def test_nothing_is_left_unwritten(draw, moving, monkeypatch):
    inputs, empty = draw(*MOVING[moving], rows=35, vocabulary=3 * BLOCK + 5, dtype=torch.bfloat16), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    assert fields_of(run(**inputs)).isfinite().all()


def test_inputs_are_left_alone_and_no_graph_is_built(draw):
    inputs = draw(*MOVING["all"], rows=5, bias=True)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    assert not fields_of(linear_token_stats(**inputs, softcap=3.0)).requires_grad
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())


# The public function.


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_factors_of_different_dtypes_are_multiplied_in_float32(draw, launches, dtypes):
    inputs = draw(*MOVING["all"], bias=True, rows=19)
    for name in inputs.keys() - {"targets"}:
        inputs[name] = inputs[name].to(dtypes["weight" in name or name == "dbias"])
    stats = linear_token_stats(**inputs, temperature=0.7)
    assert len(launches) == 1
    assert_as_accurate_as_plain_pytorch(stats, inputs, temperature=0.7)


def test_float64_goes_to_the_reference(draw, launches):
    inputs = draw("dhidden", rows=3)
    for name in ("bias", "dbias"):
        zeros = torch.zeros(V, dtype=torch.float64, device=inputs["hidden"].device)
        stats = linear_token_stats(**inputs, **{name: zeros})
        assert stats.logp.dtype == torch.float64
    assert launches == []


def test_numbers_may_be_numpys(draw, monkeypatch):
    """A compiled kernel takes Python's numbers only."""
    inputs, states, scales_seen = draw("dhidden", rows=3), head._states, []
    monkeypatch.setattr(head, "_states", lambda *args: scales_seen.extend(args[7:9]) or states(*args))
    stats = linear_token_stats(**inputs, temperature=np.float32(0.5), softcap=np.float32(4.0))
    assert scales_seen == [8.0, 0.25] and all(type(scale) is float for scale in scales_seen)
    assert_as_accurate_as_plain_pytorch(stats, inputs, temperature=0.5, softcap=4.0)


@pytest.mark.parametrize("architecture", [75, 80])
@pytest.mark.parametrize(
    "dtype, setting, want",
    [(torch.float32, "tf32", "tf32"), (torch.float32, "ieee", "tf32x3"), (torch.bfloat16, "tf32", "ieee")],
    ids=str,
)
def test_tf32_only_where_pytorch_may_use_it(draw, launches, monkeypatch, dtype, setting, want, architecture):
    there = configurations.Hardware(architecture, 64 if architecture < 80 else 163)
    monkeypatch.setattr(configurations, "hardware", lambda device: there)
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, setting
    try:
        linear_token_stats(**draw(rows=3, dtype=dtype))
    finally:
        settings.fp32_precision = before
    assert [launch["PRECISION"] for launch in launches] == [want if architecture >= 80 else "ieee"]


# Tiles and memory.


@needs_interpreter
@pytest.mark.parametrize("moving", MOVING)
def test_tiles_of_hopper(draw, launches, moving, monkeypatch):
    monkeypatch.setattr(configurations, "generation", lambda device: "hopper")
    monkeypatch.setattr(head, "ROWS_PER_LAUNCH", FULL["ROWS_PER_LAUNCH"])
    tile = configurations.HEAD["hopper"][moving if moving in ("nothing", "hidden") else "more"]
    inputs = draw(
        *MOVING[moving], rows=tile.rows + 3, vocabulary=tile.columns + 5, depth=tile.depth + 8, dtype=torch.bfloat16
    )
    assert_as_accurate_as_plain_pytorch(run(**inputs), inputs)
    assert [(launch["ROWS"], launch["COLUMNS"], launch["DEPTH"]) for launch in launches] == [tile[:3]]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_tiles_and_segments_of_full_size_reach_the_accuracy_that_is_promised(draw, dtype, monkeypatch):
    for name, size in FULL.items():
        monkeypatch.setattr(head, name, size)
    monkeypatch.setitem(configurations.HEAD, "least", FULL_TILES)
    inputs = draw("dhidden", "dweight", rows=133, vocabulary=700, depth=200, dtype=dtype)
    assert_relative_errors(run(**inputs), inputs)


def assert_relative_errors(stats, inputs):
    """Relative to the largest of the rows."""
    logits, dlogits = logits_and_tangent(torch.float64, **inputs)
    for name, want in plain_pytorch(logits, inputs["targets"], dlogits).items():
        error = (getattr(stats, name).double() - want).abs().max() / want.abs().max()
        assert error <= (5e-5 if name == "dentropy" else 1e-5), f"{name}: {error:.3g}"


@needs_interpreter
@pytest.mark.parametrize("vocabulary", [151_936, 10 * 151_936])
def test_scratch_memory_stays_small_at_any_size(monkeypatch, vocabulary):
    """All that is allocated for 20,000 tokens, without the work: at most 64 MiB at a time beside the outputs."""
    for name, size in FULL.items():
        monkeypatch.setattr(head, name, size)
    monkeypatch.setitem(configurations.HEAD, "least", FULL_TILES)
    now, peak = set(), [0]

    def counted(allocate):
        def allocation(*size, **options):
            tensor = allocate(*size, **options)
            entry = object(), tensor.numel() * tensor.element_size()
            now.add(entry)
            weakref.finalize(tensor, now.discard, entry)
            peak[0] = max(peak[0], sum(size for _, size in now))
            return tensor

        return allocation

    class NoLaunch:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    rows = 20_000
    hidden, weight = torch.zeros(rows, 8), torch.zeros(1, 8).expand(vocabulary, 8)
    targets = torch.zeros(rows, dtype=torch.int64)
    for module, name in ((head, "_linear_states_kernel"), (segments, "_stats_kernel")):
        monkeypatch.setattr(module, name, NoLaunch())
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    stats = run(hidden, weight, targets, dhidden=hidden)
    outputs = rows * 4 * 4
    assert stats.logp.shape == (rows,) and outputs < peak[0] <= outputs + 32 * 2**20


# What only a GPU can show.


@needs_gpu
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("depth, vocabulary", [(1536, 151_936), (4096, 32_000), (1000, 262_144)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_real_sizes(draw, moving, depth, vocabulary, dtype):
    inputs = draw(*MOVING[moving], rows=129, vocabulary=vocabulary, depth=depth, dtype=dtype)
    stats = run(**inputs)
    assert_as_accurate_as_plain_pytorch(stats, inputs)
    if moving in ("hidden", "both"):
        assert_relative_errors(stats, inputs)


@needs_gpu
@pytest.mark.parametrize("moving", ["hidden", "both"])
def test_many_rows_stay_accurate_and_within_64_mib(draw, moving):
    rows, some = 8192 + 300, slice(None, None, 97)
    inputs = draw(*MOVING[moving], rows=rows, vocabulary=151_936, depth=1536, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stats = run(**inputs)
    assert torch.cuda.max_memory_allocated() - before - rows * 4 * 4 <= 64 * 2**20
    of_rows = {name: inputs[name][some] for name in ("hidden", "dhidden", "targets")}
    assert_relative_errors(TokenStats(*(field[some] for field in stats[:4])), inputs | of_rows)


@needs_gpu
@pytest.mark.parametrize("depth", [8200, 8201], ids=["descriptors", "pointers"])
def test_more_than_two_to_the_31_elements_of_weight(draw, launches, depth):
    vocabulary = 262_144
    assert vocabulary * depth > 2**31
    inputs = draw("dhidden", rows=3, vocabulary=7, depth=depth, dtype=torch.bfloat16)
    weight = torch.zeros(vocabulary, depth, dtype=torch.bfloat16, device=inputs["hidden"].device)
    weight[-7:] = inputs["weight"]
    inputs |= {"weight": weight, "targets": inputs["targets"] + vocabulary - 7}
    stats = run(**inputs)
    assert launches[0]["TMA"] == (depth % 8 == 0 and configurations.has_descriptors(weight.device))
    logits, dlogits = (torch.zeros(3, vocabulary, dtype=torch.float64, device=weight.device) for _ in range(2))
    logits[:, -7:], dlogits[:, -7:] = logits_and_tangent(torch.float64, **inputs | {"weight": weight[-7:]})
    for name, want in plain_pytorch(logits, inputs["targets"], dlogits).items():
        torch.testing.assert_close(getattr(stats, name).double(), want, rtol=5e-5, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moving", MOVING)
def test_a_new_number_of_rows_compiles_nothing(draw, moving, dtype):
    inputs = draw(*MOVING[moving], rows=300, vocabulary=5000, depth=64, dtype=dtype, bias=True)
    of_rows = [name for name in ("hidden", "dhidden", "targets") if name in inputs]

    def compiled():
        device = torch.cuda.current_device()
        return [len(jitted.device_caches[device][0]) for jitted in (head._linear_states_kernel, segments._stats_kernel)]

    run(**inputs)
    before = compiled()
    assert all(before)
    for rows in (1, 2, 16, 33, 128, 129, 299):
        run(**inputs | {name: inputs[name][:rows] for name in of_rows})
    run(**inputs | {name: inputs[name][1:] for name in of_rows})
    assert compiled() == before
