"""The CUDA kernels on a CPU, for tests: emulate.cpp in place of a GPU, behind cuda.py's own `forward` and `backward`."""
import contextlib
import ctypes
import functools
import subprocess
from pathlib import Path
from unittest import mock

from msda_cuda import build, cpu, cuda

HERE = Path(__file__).parent


@functools.cache
def library(config):
    """emulate.cpp, compiled for a config; OSError without a C++ compiler."""
    compiler, version = cpu.compiler()
    source = {name: (HERE / name).read_text() for name in ("emulate.cpp", "msda.cu", "sampling.h")}

    def make(path):
        header = path.with_name("config.h")
        header.write_text(config.header())
        subprocess.run([compiler, "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{header.parent}",
                        str(HERE / "emulate.cpp"), "-o", str(path)], check=True)
        header.unlink()
    return ctypes.CDLL(str(build.cached("emulate", ".so", (source, config.header(), version), make)))


def launch(name, config, shapes, S, queries, tensors, processors=1):
    """As cuda.launch, with addresses of tensors on the CPU."""
    B, Q, M = queries
    cuda.check_memory(name, tensors, tensors[0].device)
    if B * Q * M == 0:
        return
    threads = config.threads(B * M, Q, processors)
    arguments = cuda.kernel_arguments(tensors, shapes, (S, M, Q))
    values = [a.value if isinstance(a, ctypes.c_void_p) else ctypes.addressof(a) for a in arguments]
    blocks, shared = cuda.grid(config, queries, threads)
    assert shared <= cuda.SHARED_MEMORY and threads % 32 == 0
    run = getattr(library(config), f"run_{name}")
    run.restype = ctypes.c_bool
    assert run(blocks, threads, (ctypes.c_void_p * len(values))(*values)), "lanes of a warp parted"


@contextlib.contextmanager
def gpu():
    """Within, cuda.forward and cuda.backward take tensors on the CPU."""
    with mock.patch.object(cuda, "launch", launch):
        yield
