"""Where compiled code is kept between runs: $XDG_CACHE_HOME/mindetr, by default ~/.cache/mindetr."""
import functools
import hashlib
import os
import tempfile
from pathlib import Path


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
