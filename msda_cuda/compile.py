"""python -m msda_cuda.compile: the kernels compiled for every generation of GPUs, with what they cost; needs no GPU.

Prints registers a thread, bytes spilled, and how many threads a multiprocessor can then hold, and fails when a kernel of
the usual size spills more than a few bytes. NVRTC compiles, as in use; nvcc too, where there is one.
"""
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from msda_cuda import cuda

ARCHITECTURES = 75, 80, 90, 100
CONFIGS = [cuda.Config(value, query, 32, 4, 4, R) for value, query, R in [
    (torch.float32, torch.float32, 2), (torch.float32, torch.float32, 4), (torch.bfloat16, torch.bfloat16, 2),
    (torch.float16, torch.float16, 4), (torch.bfloat16, torch.float32, 4)]]
CONFIGS += [cuda.Config(torch.float64, torch.float64, 32, 4, 4, 2), cuda.Config(torch.float32, torch.float32, 16, 4, 4, 4),
            cuda.Config(torch.float16, torch.float16, 33, 3, 5, 2), cuda.Config(torch.float32, torch.float32, 256, 5, 8, 4)]


def costs(log):
    """(kernel, registers, bytes spilled) of the kernels in ptxas's report."""
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.S)
    return [(name, int(registers), int(spilled)) for name, spilled, registers in found]


def main():
    source = {name: (cuda.HERE / name).read_text() for name in ("msda.cu", "sampling.h")}
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    try:
        supported = cuda.nvrtc_architectures()
    except OSError as error:
        raise SystemExit(f"error: nothing was compiled: {error}")
    print(f"NVRTC {cuda.nvrtc_version()}{'' if nvcc else '; no nvcc here'}")
    worst = 0
    for config in CONFIGS:
        kind = "boxes" if config.R == 4 else "points"
        types = " ".join(str(t).removeprefix("torch.") for t in dict.fromkeys((config.value, config.query)))
        title = f"{types}, {config.D} channels, {config.L} x {config.P} points, {kind}"
        for arch in ARCHITECTURES:
            if arch not in supported:
                print(f"{title:52} sm_{arch:<4} unknown to this NVRTC")
                continue
            options = [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--ptxas-options=-v"]
            report = costs(cuda.compile_source(config, source, options)[1])
            assert [name for name, *_ in report] == ["backward", "forward"], report
            for name, registers, spilled in reversed(report):
                most = 1024 if arch == 75 else 2048
                threads = min(most, 65536 // (-(-registers // 8) * 8 * 256) * 256)
                print(f"{title:52} sm_{arch:<4}{name:9}{registers:4} registers {spilled:4} bytes spilled "
                      f"{threads:5} of {most} threads")
                worst = max(worst, spilled if config.D <= 32 else 0)
        if nvcc:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.h").write_text(config.header())
                subprocess.run([nvcc, "-std=c++17", "-arch=sm_90", "-cubin", f"-I{folder}", "-Werror", "all-warnings", "-o",
                                f"{folder}/msda.cubin", str(cuda.HERE / "msda.cu")], check=True)
            print(f"{title:52} sm_90  nvcc compiles it too, without a warning")
    if worst > 32:
        raise SystemExit(f"error: a kernel of the usual size spills {worst} bytes")


if __name__ == "__main__":
    main()
