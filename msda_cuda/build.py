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

    `omp parallel for` runs in the threads that torch's own operators use: the OpenMP that torch loaded is found before any
    other. Where the compiler has no OpenMP, in one thread.
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

    for openmp in "-fopenmp", "-fopenmp-simd":
        try:
            return ctypes.CDLL(str(cached(Path(source).stem, ".so", (texts, FLAGS, openmp, version, features),
                                          functools.partial(make, openmp=openmp))))
        except OSError as error:
            failure = error
    raise failure
