"""The CUDA kernels on a CPU: emulate.cpp instead of a GPU, behind cuda.py's own launch."""
import contextlib
import ctypes
import functools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from msda_cuda import cpu, cuda

SOURCE, KERNELS = Path(__file__).with_name("emulate.cpp"), Path(cuda.__file__).parent


@functools.cache
def kernels(config, device):
    """The emulated kernels for a config; OSError without a C++ compiler."""
    def make(path):
        path.with_name("config.h").write_text(config.header())
        cpu.compile_cpp("-O1", "-std=c++20", f"-I{path.parent}", f"-I{KERNELS}", SOURCE, "-o", path)

    texts = [file.read_text() for file in (SOURCE, KERNELS / "msda.cu", KERNELS / "sampling.h")]
    made_of = texts, config.header(), cpu.compile_cpp("-dM", "-E", "-x", "c++", "/dev/null")
    library = ctypes.CDLL(cpu.cached("emulate.so", made_of, make))
    return {"forward": library.run_forward, "backward": library.run_backward}


def launch(run, blocks, y, z, threads, ty, tz, shared, stream, arguments, extra):
    """As cuLaunchKernel; it fails where the lanes of a warp part."""
    assert threads % 32 == 0 and shared <= cuda.SHARED_MEMORY
    return 0 if run(blocks, threads, arguments) else 719


@contextlib.contextmanager
def gpu():
    """Within, cuda.forward and cuda.backward take tensors on the CPU."""
    driver = SimpleNamespace(cuLaunchKernel=launch, cuCtxSetCurrent=lambda context: 0)
    here = SimpleNamespace(multi_processor_count=1, cuda_stream=0)
    with mock.patch.multiple(cuda, driver=lambda: driver, kernels=kernels, context=mock.Mock()), \
            mock.patch.multiple(torch.cuda, device=contextlib.nullcontext,
                                get_device_properties=lambda device: here,
                                current_stream=lambda device: here):
        cuda.plan.cache_clear()
        yield
    cuda.plan.cache_clear()
