"""C++ compiled at first use, and where compiled code is kept between runs: $XDG_CACHE_HOME/mindetr, by default
~/.cache/mindetr.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]


@functools.cache
def folder():
    """The cache, or, where it cannot be written, a folder that ends with this process."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindetr"
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return path
    except OSError:
        folder.kept = tempfile.TemporaryDirectory(prefix="mindetr-")
        return Path(folder.kept.name)


def cached(name, suffix, made_of, make):
    """The file that make(path) writes, made only if this machine has not made it before of the same things.

    Args:
        name, suffix: the file's name is name-<hash of made_of><suffix>.
        made_of: everything that the content depends on (source, options, compiler's version); hashed by its repr.
    """
    target = folder() / f"{name}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as scratch:         # renamed whole: two processes may build at once
            built = Path(scratch) / target.name
            make(built)
            os.replace(built, target)
    return target


def compiler():
    """The C++ compiler's path, and what it says of its version; OSError where there is none."""
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not path:
        raise OSError("no C++ compiler found: install g++, or set CXX to one")
    try:
        return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"the C++ compiler does not run ({error}): install g++, or set CXX to one") from error


@functools.cache
def cpp(source, *headers):
    """The functions of a C++ file, compiled if the cache has them not; OSError where that is impossible.

    `omp parallel for` runs in the threads of torch's own operators where both use GNU's OpenMP: the one that torch loaded is
    found before any other. Where the compiler has no OpenMP, it runs in one thread, and a warning says so.
    """
    path, version = compiler()
    cpu = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))][:1] \
        if cpu.exists() else platform.processor()                         # -march=native means these
    texts = [Path(file).read_text() for file in (source, *headers)]

    def make(built, openmp):
        try:
            subprocess.run([path, *FLAGS, openmp, str(source), "-o", str(built)], capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"{Path(source).name} could not be compiled ({error.stderr})") from error

    def load(openmp):
        made_of = texts, FLAGS, openmp, version, features
        return ctypes.CDLL(str(cached(Path(source).stem, ".so", made_of, functools.partial(make, openmp=openmp))))

    try:
        return load("-fopenmp")
    except OSError:
        functions = load("-fopenmp-simd")
    warnings.warn(f"{Path(source).name} runs in one thread: {path} has no OpenMP; set CXX to a compiler that has it",
                  stacklevel=2)
    return functions
