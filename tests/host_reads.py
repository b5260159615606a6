"""Places where the host asks for values of a tensor: on a GPU it would wait there for all that is queued before."""

import traceback
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Where a CPU's own forms stand, which may read. On a GPU they are kernels.
CPU_FORMS = ("dentropy/stats/", "dentropy/model/attention_ops.py")
FUNCTIONS = {Tensor.tolist, Tensor.item, Tensor.cpu, torch.equal}
FUNCTIONS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
LENGTH_UNKNOWN = {Tensor.repeat_interleave, torch.repeat_interleave}
aten = torch.ops.aten
OPERATORS = {  # that ask for a value, or for how many there are
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_consecutive, aten.unique_dim, aten.bincount,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_}


@contextmanager
def host_reads():
    """The places, "file: line of code", that are found inside."""
    places = []
    with _Functions(places), _Operators(places):
        yield places


def _note(places: list[str]) -> None:
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    if any(form in frame.filename for frame in frames for form in CPU_FORMS):
        return
    last = next(frame for frame in reversed(frames) if not frame.filename.endswith("/model/short_tangents.py"))
    places.append(f"{last.filename}: {last.line}")


class _Functions(TorchFunctionMode):
    """What Python asks for: a list of a CPU's tensor passes no operator."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FUNCTIONS or (func in LENGTH_UNKNOWN and "output_size" not in kwargs):
            _note(self.places)
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """What operators ask for, and the tangents' own among them."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if packet in INDEXED else []
        if packet in OPERATORS or masks:
            _note(self.places)
        return func(*args, **(kwargs or {}))
