"""Checks what the build needs, then drives CMakeLists.txt, which holds the compile rules.

pyproject.toml holds everything else. Each thing that is missing is said in one line.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMPILING_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
NEEDED = {"setuptools": "77", "torch": "2.11", "cmake": "3.25"}


def stop(problem, remedy):
    raise SystemExit(f"tvmf_ext: {problem}. {remedy}.")


def numbers(version):
    """The leading numbers of a version: (2, 14, 1) of "2.14.1+cu130"."""
    return tuple(int(n) for n in re.match(r"\d+(\.\d+)*", version).group().split("."))


def pip_install(name):
    wanted = f"'{name}>={NEEDED[name]}'" if name in NEEDED else name
    return f"Run `pip install {wanted}`, or build without --no-build-isolation, which brings it"


def check_version(name, found):
    if numbers(found) < numbers(NEEDED[name]):
        stop(f"{name} >= {NEEDED[name]} is needed to build, got {found}", pip_install(name))


def find_program(*names):
    """The path of the first of these on PATH, or beside this Python, whose environment may not be
    activated; None where there is none."""
    folders = f"{os.environ.get('PATH', '')}{os.pathsep}{sysconfig.get_path('scripts')}"
    return next(filter(None, (shutil.which(name, path=folders) for name in names)), None)


def find_torch():
    """The folder of a torch that is new enough."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
            import torch
    except ImportError as error:
        stop(
            f"torch >= {NEEDED['torch']} is needed to build, and `import torch` fails ({error})",
            pip_install("torch"),
        )
    check_version("torch", torch.__version__)
    return Path(torch.__file__).parent


def find_cmake():
    cmake = find_program("cmake")
    if not cmake:
        stop("cmake is needed to build, and none was found", pip_install("cmake"))
    result = subprocess.run([cmake, "--version"], capture_output=True, text=True)
    found = re.search(r"cmake version (\S+)", result.stdout)
    if not found:
        stop(f"{cmake} --version fails{last_line(result)}", pip_install("cmake"))
    check_version("cmake", found[1])
    return cmake


def find_ninja():
    ninja = find_program("ninja", "ninja-build", "samu")
    if not ninja:
        stop("ninja is needed to build, and none was found", pip_install("ninja"))
    return ninja


def last_line(result):
    """What a failed program printed, in brief: the last line that names an error, or the last."""
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(error|fatal) *:", line)]
    return f": {(errors or lines)[-1]}" if lines else ", and prints nothing"


def check_compiler():
    """Compiles an empty C++20 program that includes Python's headers."""
    remedy = (
        "Install one with C++20, such as GCC 12 or Clang 14 (`apt install g++`, `dnf install "
        "gcc-c++`), or set CXX to its path"
    )
    # CMake looks for the same names, in this order.
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        find_program("c++", "g++", "icpx", "clang++")
    ]
    if not compiler[0]:
        stop("a C++ compiler is needed to build, and none was found", remedy)
    if not shutil.which(compiler[0]):
        stop(f"CXX names a C++ compiler that does not exist, got {compiler[0]}", remedy)
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        stop(
            f"Python's headers are needed to build, and {include}/Python.h does not exist",
            "Install them (`apt install python3-dev`, `dnf install python3-devel`)",
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("#include <concepts>\nint main() {}\n")
        command = [*compiler, "-std=c++20", "-c", source, "-o", source.with_suffix(".o")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        stop(f"{' '.join(compiler)} does not compile C++20{last_line(result)}", remedy)


def configure(command):
    """Runs CMake's first step, and repeats its first error in one line, which pip prints last."""
    sys.stdout.flush()
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    print(result.stderr, end="", file=sys.stderr, flush=True)
    if result.returncode:
        # An error of a function is followed by the call stack, after one empty line.
        end = r"\n\n(?:\n|Call Stack)"
        error = re.search(rf"^CMake Error.*?:\n(.*?){end}", result.stderr, re.DOTALL | re.MULTILINE)
        text = " ".join(error[1].split()) if error else ""
        if not 0 < len(text) < 400:
            text = "the reason stands above"
        raise SystemExit(f"tvmf_ext: CMake cannot configure the build: {text}")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        torch, cmake, ninja = find_torch(), find_cmake(), find_ninja()
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # Every environment builds in one folder: the kernels do not see torch's headers, so that
        # they compile once.
        build = ROOT / "build" / "cmake"
        # A cache of another environment names compilers and a torch that may be gone. Objects stay
        # good as long as their commands are the same.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "TVMF_TORCH_DIR": torch,
            "TVMF_OUTPUT_DIR": output,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        configure([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines])
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        if subprocess.run([cmake, "--build", build, "--parallel", jobs]).returncode:
            raise SystemExit("tvmf_ext: the compilation failed; the compiler's errors stand above.")


if __name__ == "__main__":
    # Older releases cannot read pyproject.toml: they refuse `license = "MIT"`.
    check_version("setuptools", setuptools.__version__)
    # The rest is checked before setuptools prints what it copies. Metadata and a source
    # distribution need none of it.
    if COMPILING_COMMANDS & set(sys.argv):
        find_torch()
        find_cmake()
        find_ninja()
        check_compiler()
    setuptools.setup(
        ext_modules=[setuptools.Extension("tvmf_ext._C", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": CMakeBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
