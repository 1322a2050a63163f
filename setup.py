"""Drives CMakeLists.txt, which holds the compile rules; pyproject.toml holds everything else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        try:
            import torch
        except ImportError as error:
            raise SystemExit(
                f"tvmf_ext: torch >= 2.11 is needed to build ({error}). Install it first, or build "
                "without --no-build-isolation."
            ) from error
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # One folder for every environment: kernels, which know nothing of torch, compile once.
        build = ROOT / "build" / "cmake"
        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTVMF_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DTVMF_OUTPUT_DIR={output}",
        ]  # fmt: skip
        # A cache of another environment points at compilers and torches that may be gone; its
        # objects are good as long as their commands are the same.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension("tvmf_ext._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
