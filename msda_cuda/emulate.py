"""The CUDA kernels on a CPU, for tests: emulate.cpp in place of a GPU, behind cuda.py's own launch."""
import contextlib
import ctypes
import functools
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from msda_cuda import build, cuda

HERE = Path(__file__).parent


@functools.cache
def library(config):
    """emulate.cpp, compiled for a config; OSError without a C++ compiler."""
    compiler, version = build.compiler()
    source = {name: (HERE / name).read_text() for name in ("emulate.cpp", "msda.cu", "sampling.h")}

    def make(path):
        header = path.with_name("config.h")
        header.write_text(config.header())
        subprocess.run([compiler, "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{header.parent}",
                        str(HERE / "emulate.cpp"), "-o", str(path)], check=True)
        header.unlink()
    return ctypes.CDLL(str(build.cached("emulate", ".so", (source, config.header(), version), make)))


class Driver:
    """CUDA's driver as far as cuda.py needs it: a launch runs the emulated kernel, and fails where lanes of a warp part."""

    @staticmethod
    def cuLaunchKernel(run, blocks, y, z, threads, ty, tz, shared, stream, arguments, extra):
        assert (y, z, ty, tz, extra) == (1, 1, 1, 1, None) and shared <= cuda.SHARED_MEMORY and threads % 32 == 0
        return 0 if run(blocks, threads, arguments) else 719

    @staticmethod
    def cuGetErrorString(status, text):
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"lanes of a warp parted"


def kernel(name, config, device):
    run = getattr(library(config), f"run_{name}")
    run.restype = ctypes.c_bool
    return run


@contextlib.contextmanager
def gpu(driver=Driver):
    """Within, cuda.forward and cuda.backward take tensors on the CPU."""
    gpu = SimpleNamespace(multi_processor_count=1)
    with mock.patch.object(cuda, "driver", lambda: driver), mock.patch.object(cuda, "kernel", kernel), \
            mock.patch.object(cuda, "make_current"), mock.patch.object(torch.cuda, "device", contextlib.nullcontext), \
            mock.patch.object(torch.cuda, "get_device_properties", lambda device: gpu), \
            mock.patch.object(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0)):
        yield
