"""The C kernel: passes over gradients and the cells of shared memory. Compiled once per machine, loaded in a millisecond.

`torch.compile` reaches the same speed for the passes of fixed point, but a process that uses it pays seconds of import and
compilation before its first micro-batch, and a joiner has six seconds in all. Without a compiler the torch operations in
`fixed_point` give the same bits, and members add up over sockets.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = r"""
#include <stdint.h>
#include <string.h>
#include <math.h>

#define BLOCK 4096                 /* values and total of a block stay in the first-level cache */
#define MAGIC 6755399441055744.0   /* 1.5 * 2^52: adding it rounds half to even and leaves the integer in the low bits */
#define MAGIC_LIMIT 2251799813685248.0 /* 2^51 */

static int64_t magic_bits(double x) { int64_t bits; memcpy(&bits, &x, 8); return bits; }

/* Any size, refusals included: one conversion at a time. */
static int64_t fold_slowly(int64_t *restrict total, const float *restrict values, int64_t size,
                           double scale, double bound, int first)
{
    int64_t refused = 0;
    for (int64_t i = 0; i < size; i++) {
        double scaled = (double)values[i] * scale;
        int fits = fabs(scaled) <= bound;
        refused += !fits;
        total[i] = (first ? 0 : total[i]) + llrint(fits ? scaled : 0.0);
    }
    return refused;
}

/* Every value below MAGIC_LIMIT, which is nearly always: the compiler makes vectors of these loops. */
static void fold_fast(int64_t *restrict total, const float *restrict values, int64_t size, double scale, int first)
{
    const int64_t zero = magic_bits(MAGIC);
    if (first)
        for (int64_t i = 0; i < size; i++)
            total[i] = magic_bits((double)values[i] * scale + MAGIC) - zero;
    else
        for (int64_t i = 0; i < size; i++)
            total[i] += magic_bits((double)values[i] * scale + MAGIC) - zero;
}

int64_t elastic_fold(int64_t *restrict total, const float *restrict values, int64_t size,
                     double scale, double bound, int first)
{
    int64_t refused = 0;
    double limit = bound < MAGIC_LIMIT ? bound : MAGIC_LIMIT;
    for (int64_t start = 0; start < size; start += BLOCK) {
        int64_t length = size - start < BLOCK ? size - start : BLOCK, large = 0;
        for (int64_t i = 0; i < length; i++)
            large += !(fabs((double)values[start + i] * scale) <= limit);
        if (large)
            refused += fold_slowly(total + start, values + start, length, scale, bound, first);
        else
            fold_fast(total + start, values + start, length, scale, first);
    }
    return refused;
}

void elastic_to_float(const int64_t *restrict total, int64_t size, double scale, float *restrict out)
{
    for (int64_t i = 0; i < size; i++)
        out[i] = (float)((double)total[i] * scale);
}

/* What is written before a cell is stored is seen by whoever has loaded that value from it. */
int64_t elastic_load(const int64_t *cell) { return __atomic_load_n(cell, __ATOMIC_ACQUIRE); }
void elastic_store(int64_t *cell, int64_t value) { __atomic_store_n(cell, value, __ATOMIC_RELEASE); }

/* Replace elements [start, stop) of every part by their sum, added in the order of the parts. */
#define ADD_UP(NAME, TYPE)                                                                              \
    void NAME(TYPE *const *parts, int64_t num_parts, int64_t start, int64_t stop)                       \
    {                                                                                                   \
        TYPE sum[BLOCK / 2];                                                                            \
        for (int64_t at = start; at < stop; at += BLOCK / 2) {                                          \
            int64_t length = stop - at < BLOCK / 2 ? stop - at : BLOCK / 2;                             \
            memcpy(sum, parts[0] + at, length * sizeof(TYPE));                                          \
            for (int64_t part = 1; part < num_parts; part++)                                            \
                for (int64_t i = 0; i < length; i++)                                                    \
                    sum[i] += parts[part][at + i];                                                      \
            for (int64_t part = 0; part < num_parts; part++)                                            \
                memcpy(parts[part] + at, sum, length * sizeof(TYPE));                                   \
        }                                                                                               \
    }
ADD_UP(elastic_add_up_int64, uint64_t) /* unsigned: wraps, as every other way of adding int64 does */
ADD_UP(elastic_add_up_float32, float)
"""
# No -ffast-math: NaN must compare as NaN. Neither errno nor traps are looked at, which lets the loops become vectors.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 60


def available(device: torch.device) -> bool:
    """Whether the kernel can work on tensors of this device."""
    return device.type == "cpu" and _library() is not None


def fold(total: Tensor, values: Tensor, scale: float, bound: float, first: bool) -> int:
    library = _library()
    assert library is not None
    assert total.is_contiguous() and values.is_contiguous() and total.numel() == values.numel()
    return library.elastic_fold(total.data_ptr(), values.data_ptr(), total.numel(), scale, bound, int(first))


def to_float(total: Tensor, scale: float, out: Tensor) -> None:
    library = _library()
    assert library is not None
    assert total.is_contiguous() and out.is_contiguous() and total.numel() == out.numel()
    library.elastic_to_float(total.data_ptr(), total.numel(), scale, out.data_ptr())


def load(cell: int) -> int:
    """The int64 at this address, in shared memory."""
    library = _library()
    assert library is not None
    return library.elastic_load(cell)


def store(cell: int, value: int) -> None:
    library = _library()
    assert library is not None
    library.elastic_store(cell, value)


def add_up(parts: Sequence[int], dtype: torch.dtype, start: int, stop: int) -> None:
    """Replace elements [start, stop) of the arrays at these addresses by their sum."""
    library = _library()
    assert library is not None
    add = {torch.int64: library.elastic_add_up_int64, torch.float32: library.elastic_add_up_float32}[dtype]
    add((ctypes.c_void_p * len(parts))(*parts), len(parts), start, stop)


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("ELASTIC_LM_KERNEL") == "torch":  # same bits, slower: for comparing the two
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("No C compiler that works (%s): folding gradients with torch operations, same bits, slower.", error)
        return None
    pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.elastic_fold.argtypes = [pointer, pointer, size, real, real, ctypes.c_int]
    library.elastic_fold.restype = ctypes.c_int64
    library.elastic_to_float.argtypes = [pointer, size, real, pointer]
    library.elastic_to_float.restype = None
    library.elastic_load.argtypes = [pointer]
    library.elastic_load.restype = size
    library.elastic_store.argtypes = [pointer, size]
    library.elastic_store.restype = None
    for add in (library.elastic_add_up_int64, library.elastic_add_up_float32):
        add.argtypes = [pointer, size, size, size]
        add.restype = None
    return library


def _compiled() -> Path:
    """The shared library for this source on this processor, compiled when it is not in the cache.

    Raises: OSError or SubprocessError when there is no compiler or it fails.
    """
    folder = _cache_folder()
    target = folder / f"kernel-{_key()}.so"
    if target.exists():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("neither cc, gcc nor clang is installed")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, built = Path(work, "kernel.c"), Path(work, "kernel.so")
        source.write_text(SOURCE)
        command = [compiler, *FLAGS, str(source), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
        os.replace(built, target)  # atomic: members of one machine may compile at the same time
    return target


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "elastic-lm")
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:  # a read-only home
        base = Path(tempfile.gettempdir(), f"elastic-lm-{os.getuid()}")
        base.mkdir(mode=0o700, exist_ok=True)
        if base.stat().st_uid != os.getuid():
            raise OSError(f"{base} belongs to somebody else") from None
    return base


def _key() -> str:
    """Names source, flags and processor: `-march=native` must not meet another instruction set through a shared home."""
    try:
        processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        processor = platform.processor()
    text = "\n".join((SOURCE, *FLAGS, platform.machine(), processor))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
