"""Checks, before anything is installed, that this machine can build the virtual environment and compiled code.

Run by the Makefile with the Python that is to make the environment. Keeps to syntax that Python 3.6 reads, so that an
old one gives the message instead of a syntax error. Prints every problem with its fix; the exit status is their number.
"""

import os
import shutil
import sys
import sysconfig

OLDEST = (3, 10)


def problems():
    """Yield one line for each thing that is missing."""
    if sys.version_info < OLDEST:
        version = ".".join(str(number) for number in sys.version_info[:3])
        yield f"{sys.executable} is Python {version}; choose 3.10 or newer with `make PYTHON=/path/to/python3`"
    for module in ("venv", "ensurepip"):
        if not _imports(module):
            yield f"Python's module {module} is missing; install it (Debian and Ubuntu: apt install python3-venv)"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        yield f"the C++ compiler {compiler!r} is missing; install it (Debian and Ubuntu: apt install g++) or set CXX"
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.isfile(header):
        yield f"{header} is missing; install Python's headers (Debian and Ubuntu: apt install python3-dev)"


def _imports(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    found = list(problems())
    for problem in found:
        print("error: " + problem, file=sys.stderr)
    sys.exit(len(found))
