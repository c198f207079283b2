"""`one_token.c`, compiled once for this processor and proven against PyTorch, else left out.

Without a C compiler, or where its work does not prove right, `library()` is None and tokens are computed by PyTorch's
own operations: the same numbers up to rounding, in more and slower steps. `CC` names the compiler (default: cc), and
`DOUGONG_NATIVE=0` leaves it out.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dougong.core.files import default_cache

ACTIONS = {name: number for number, name in enumerate((
    "product", "sorted", "rms_norm", "layer_norm", "heads", "append", "attend", "add", "mix", "gate", "gelu",
    "gelu_tanh", "relu2"))}
KINDS = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3}
"""of a matrix: its dtype, or the bits of its integers"""

_SOURCE = Path(__file__).with_name("one_token.c")
# sums may be taken in any order, and NaN must stay NaN: hence not -ffast-math
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fassociative-math",
          "-fno-signed-zeros", "-fno-trapping-math")
_SECONDS = 60     # for the compiler, which takes one or two


class Operation(ctypes.Structure):
    """`struct operation`."""

    _fields_ = [("action", ctypes.c_int64), ("kind", ctypes.c_int64), *((name, ctypes.c_void_p) for name in "abcdy"),
                ("n", ctypes.c_int64 * 6), ("step", ctypes.c_int64 * 3), ("real", ctypes.c_double),
                ("together", ctypes.c_int64)]

    @classmethod
    def of(cls, action: str, reads: Sequence[Tensor | None], writes: Tensor | None, *numbers: int, kind: int = 0,
           real: float = 0.0, together: bool = False) -> "Operation":
        """Vectors are (texts, width), from which the steps are taken. It holds addresses alone: whoever makes one keeps
        the tensors."""
        given = [*reads, *[None] * (4 - len(reads)), writes]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in given]
        steps = [0 if tensor is None or tensor.dim() < 2 else tensor.stride(0) for tensor in (*given[:2], writes)]
        return cls(ACTIONS[action], kind, *pointers, (ctypes.c_int64 * 6)(*numbers), (ctypes.c_int64 * 3)(*steps), real,
                   together)


class Place(ctypes.Structure):
    """`struct place`."""

    _fields_ = [("begin", ctypes.c_int64), ("end", ctypes.c_int64), ("width", ctypes.c_int64),
                ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p)]


def library() -> Any | None:
    """The compiled `run(operations, count, places, texts, threads)` and `lanes()`, or None; `reason` says why."""
    return _open()[0]


def reason() -> str:
    """How a token is computed here, for people."""
    return _open()[1]


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("DOUGONG_NATIVE") == "0":
        return None, "by PyTorch (DOUGONG_NATIVE=0)"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None, "by PyTorch: there is no C compiler (cc, or what CC names)"
    try:
        path = _compiled(compiler)
        try:
            opened = _load(path)
        except OSError:     # damaged
            path.unlink()
            opened = _load(_compiled(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip()
        if not said:
            ended = isinstance(error, subprocess.CalledProcessError)
            said = f"exit status {error.returncode}" if ended else type(error).__name__
        return None, f"by PyTorch: {compiler} failed ({said.splitlines()[0][:200]})"
    if not _proven(opened):
        return None, f"by PyTorch: what {compiler} makes computes something else"
    return opened, f"in C, {opened.lanes()} numbers at a time"


def _compiled(compiler: str) -> Path:
    """The library's file, from the cache where source, compiler and processor are the same."""
    made_from = [_SOURCE.read_text(), *_FLAGS, compiler, os.stat(compiler).st_mtime_ns, platform.machine(),
                 _processor()]
    name = f"one_token-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"
    try:
        folder = default_cache() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists():
            return folder / name
        temporary = tempfile.mkdtemp(dir=folder)
    except OSError:      # a home that cannot be written: compiled for this process alone
        folder = temporary = Path(tempfile.mkdtemp())
    path = Path(temporary) / name
    try:
        subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(path), "-lm"], check=True, text=True,
                       timeout=_SECONDS, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if folder != temporary:
            os.replace(path, folder / name)
    finally:
        if folder != temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / name


def _processor() -> str:
    """What the compiler's `native` means here."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def _load(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    opened.run.argtypes = [ctypes.POINTER(Operation), ctypes.c_int64, ctypes.POINTER(Place), ctypes.c_int64,
                           ctypes.c_int]
    opened.run.restype, opened.lanes.restype = None, ctypes.c_int64
    return opened


def _proven(opened: ctypes.CDLL) -> bool:
    """Whether small products of each kind and a small attention are PyTorch's: compilers err too."""
    own = torch.Generator().manual_seed(0)
    x_BI, bias_O = torch.randn(6, 64, generator=own), torch.randn(7, generator=own)
    whole_OI = torch.randint(-8, 8, (7, 64), generator=own)
    scale_OG, halves_OI, sorted_BI = torch.randn(7, 2, generator=own).half(), (whole_OI + 8).byte(), torch.empty(6, 64)
    matrices = {torch.float32: whole_OI.float(), torch.bfloat16: whole_OI.bfloat16(), 8: whole_OI.to(torch.int8),
                4: halves_OI[:, 0::2] | halves_OI[:, 1::2] << 4}
    for texts in (1, 6):
        for form, matrix in matrices.items():
            y_BO, whole = torch.empty(6, 7), isinstance(form, int)
            x, scale = (sorted_BI if form == 4 else x_BI), (scale_OG if whole else None)
            _run(opened, texts, Place(), Operation.of("sorted", [x_BI], sorted_BI, 64),
                 Operation.of("product", [x, matrix, scale, bias_O], y_BO, 7, 64, 32, kind=KINDS[form]))
            right_OI = whole_OI * (scale_OG.float().repeat_interleave(32, 1) if whole else 1.0)
            if not torch.allclose(y_BO[:texts], (x_BI @ right_OI.t() + bias_O)[:texts], rtol=1e-4, atol=1e-4):
                return False
    q, k, v = (torch.randn(1, heads, S, 32, generator=own) for heads, S in ((4, 1), (2, 21), (2, 21)))
    y, where = torch.empty(1, 4, 1, 32), [torch.tensor([part.data_ptr()]) for part in (k, v)]
    _run(opened, 1, Place(0, 21, 21), Operation.of("attend", [q, *where], y, 4, 2, 32))
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return torch.allclose(y, right, rtol=1e-4, atol=1e-5)


def _run(opened: ctypes.CDLL, texts: int, place: Place, *operations: Operation) -> None:
    opened.run((Operation * len(operations))(*operations), len(operations), ctypes.byref(place), texts, 1)
