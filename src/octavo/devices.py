"""What this machine can do, asked when called; importing it asks nothing.

Which device and dtype to use where the user names none, and how much memory is left on it.
"""

import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from threading import Lock, current_thread, main_thread

import torch

from octavo.errors import RequestError, did_you_mean

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
    "float32": torch.float32, "fp32": torch.float32,
}  # fmt: skip


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name` (cpu, cuda, cuda:1, mps), or the fastest one here.

    Raises:
        RequestError: no such device, here or at all.
    """
    if name is None or name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        suggestion = did_you_mean(name, ("cpu", "cuda", "mps"))
        raise RequestError(f"There is no device '{name}'. Use cpu, cuda, cuda:1 or mps.{suggestion}") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise RequestError(
            f"This machine has no device '{name}' that torch can use. Leave the device out to use '{pick_device()}'."
        )
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the one called `name`, or what suits `device`.

    A CPU gets float32: most have no 16-bit units and are six times slower without. A GPU gets bfloat16, the dtype that
    SD3.5 is released in, or float16 where bfloat16 would be emulated.

    Raises:
        RequestError: no such dtype.
    """
    if name is not None and name != "auto":
        if name not in DTYPES:
            raise RequestError(f"There is no dtype '{name}'. Use {', '.join(DTYPES)}.{did_you_mean(name, DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def free_bytes(device: torch.device) -> int | None:
    """Memory on `device` that a new model could take now; None where the system does not tell."""
    if device.type == "cuda":
        # What torch keeps for itself but does not use is free to us too.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def moved(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x`, which is on the CPU, in the dtype and on the device of `like`, where the work that is under way goes on.

    From ordinary memory a GPU's driver copies only when all work before is done; from pinned memory it copies in its
    turn, while the host goes on.
    """
    if like.device.type != "cuda":
        return x.to(like)
    return x.to(like.dtype).pin_memory().to(like.device, non_blocking=True)


class Arriving:
    """A number on its way from a device, which goes on with other work meanwhile.

    Asking a GPU for a number waits for all that it was given to do; this waits for what came before it alone.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._number, self._there = x, None
        if x.device.type == "cuda":
            self._number = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._number.copy_(x, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record(torch.cuda.current_stream(x.device))

    def item(self) -> float | int | bool:
        """The number, once it is there."""
        if self._there is not None:
            self._there.synchronize()
        return self._number.item()


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a device, or the machine, saying that its memory does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


# How torch says so where it has no exception of its own: the CPU's allocator, MPS, and libraries on CUDA.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def trim_memory() -> None:
    """Give memory that was freed back to the system, as far as that is glibc's to do.

    Between weights that stay, glibc keeps the room of temporary ones for later: after remaking each weight of a model
    in another form, that is half as much as the model.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MB of freed memory for what comes next; for processes that work on and on.

    Otherwise the room of a step's tensors goes back to the system after each step and is fetched again, page by page,
    in the next: 12 to 25 % of the time of a batch of eight small pictures, 3 % of a step of SD3.5 Medium at 256x256,
    7 % at 512x512. `trim_memory` still gives it back.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: larger ones, such as weights, stay apart
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


@cache
def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return None
    return function


def compute_on_one_core() -> None:
    """Let torch's operations of the calling thread run on one core from now on, where another thread owns the device.

    Each thread that runs a parallel operation gets helpers of its own. When there are more of them than cores, GNU's
    OpenMP has all of them sleep between operations instead of waiting for the next, and the many small operations of a
    step take twice as long. Python's main thread is left as it is.
    """
    if current_thread() is main_thread():
        return
    torch.get_num_threads()  # a thread's first question sets its number
    library = _openmp()
    if library is not None:
        library.omp_set_num_threads(1)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded; torch's own switch would change the number of all threads to come."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = (line.split(maxsplit=5)[-1].strip() for line in maps)
            path = next((path for path in paths if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*\.so", path)), None)
        return None if path is None else ctypes.CDLL(path)
    except OSError:  # another system, or a library that has been replaced since
        return None


@contextmanager
def whole_processor() -> Iterator[None]:
    """Let float32 products use all of an AVX-512 processor, whoever made it.

    torch gives float32 products to MKL, which leaves AVX-512 unused on processors that are not Intel's: half the speed
    (one core of an AMD EPYC of the Zen 5 kind: 103 GFLOP/s, by oneDNN 221). torch's switch to oneDNN is named after a
    bfloat16 shortcut that oneDNN takes on some processors; it is set only where a trial shows that float32 is kept.

    The switch is the whole process's. It stays on until the last of those who asked for it, on whatever thread, ends.
    """
    if not _switch.useful:
        yield
        return
    _switch.on()
    try:
        yield
    finally:
        _switch.off()


class _Switch:
    """torch's switch of float32 products to oneDNN, and how many ask for it."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, "none"

    @property
    def useful(self) -> bool:
        with self._lock:  # the trial sets the switch itself
            return _onednn_keeps_float32()

    def on(self) -> None:
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at import
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before, matmul.fp32_precision = matmul.fp32_precision, "bf16"

    def off(self) -> None:
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            self._users -= 1
            if self._users == 0:
                matmul.fp32_precision = self._before


_switch = _Switch()


@cache
def _onednn_keeps_float32() -> bool:
    """Whether this processor has AVX-512 and multiplies in float32 with torch's oneDNN switch on."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    a, b = (torch.randn(128, 128, generator=generator) for _ in range(2))
    exact = torch.nn.functional.linear(a.double(), b.double())
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        error = (torch.nn.functional.linear(a, b) - exact).norm() / exact.norm()
    finally:
        matmul.fp32_precision = before
    return bool(error < 1e-6)  # float32 gives 1e-7, bfloat16 1e-3
