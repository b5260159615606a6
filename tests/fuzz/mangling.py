"""Mangled inputs from good ones, by a seeded generator: bytes, and the structures that JSON and pickles hold."""

import copy
import json
from random import Random

# What stands in a place where it does not belong.
ODD = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -1.5, 1e-310, 1e300, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 59, 10**400),
    *("", "x", "1", "nan", "../up", "/etc/passwd", "a\x1b[2Jb", "a\x00b", "\ud800", "\N{SNOWMAN}", "r" * 5000),
    *([], {}, [[]], [None], [1, "a"], {"": 0}, [[[[[[[[]]]]]]]], [float("nan")], {"a": [1, {"b": None}]}),
)
# Bytes that text files begin with, break at or cannot hold.
ODD_BYTES = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00", b"\xff", b"\r\n", b"\n", b"\x1b[31m", b"{", b"]", b'"')


def mangled_bytes(good: bytes, random: Random) -> bytes:
    """One to three of: flip, cut, insert, repeat, drop, swap."""
    data = bytearray(good)
    for _ in range(random.randint(1, 3)):
        i, j = sorted(random.randrange(len(data) + 1) for _ in range(2))
        match random.randrange(7):
            case 0 if data:
                data[min(i, len(data) - 1)] ^= 1 << random.randrange(8)
            case 1:
                del data[i:]
            case 2:
                data[i:i] = random.choice(ODD_BYTES)
            case 3:
                data[:0] = random.choice(ODD_BYTES)
            case 4:
                data[j:j] = data[i : min(j, i + 200)]
            case 5:
                del data[i : min(j, i + 20)]
            case 6:
                data[i:j] = b"[" * 20_000 if random.random() < 0.02 else bytes(reversed(data[i:j]))
    return bytes(data)


def mangled(good, random: Random):
    """A copy with one to three nodes replaced by something odd, removed, doubled, renamed or put elsewhere."""
    value = [copy.deepcopy(good)]
    for _ in range(random.randint(1, 3)):
        places = list(_places(value))
        holder, key = random.choice(places)
        other_holder, other_key = random.choice(places)
        match random.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(random.choice(ODD))
            case 3 if holder is not value:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[f"{key}_"] = holder.pop(key)
            case 5:
                holder[key] = copy.deepcopy(other_holder[other_key])
    return value[0]


def as_json(value) -> bytes:
    """With what JSON has no word for, as Python writes it (NaN, Infinity) and as nobody should (lone surrogates)."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _places(value):
    """(holder, key) of every node below `value`."""
    left = [value]
    while left:
        holder = left.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                left.append(holder[key])
