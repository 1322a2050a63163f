"""What was built: one abi3 binary on the stable ABI, and that a broken one says so."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import tvmf_ext
from tvmf_ext import _C, build_info

PACKAGE = Path(tvmf_ext.__file__).parent
SYSTEM = r"(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s|ld-linux\S*)\.so.*"
needs_readelf = pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")


def readelf(*options):
    command = ["readelf", "--wide", *options, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_build_info_tells_what_runs():
    info = build_info()
    assert info.version == version("tvmf_ext")
    assert info.torch == torch.__version__
    assert info.cpu in ("baseline", "avx2", "avx512")
    assert info.stable_abi == "2.11"
    assert info.cuda == bool(info.cuda_archs)
    assert all(re.fullmatch(r"\d+\.\d", arch) for arch in info.cuda_archs)
    text = str(info)
    assert ("no CUDA" in text) == (not info.cuda)
    assert info.cpu in text
    assert info.version in text


def test_running_the_package_prints_the_build_and_checks_it(tmp_path):
    code = f"import sys, runpy; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    code += "runpy.run_module('tvmf_ext', run_name='__main__')"
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(build_info()) in result.stdout
    assert re.search(r"self-check: relative error .*: ok", result.stdout)


def test_one_binary_for_every_python():
    assert [path.name for path in PACKAGE.glob("_C*")] == ["_C.abi3.so"]


@needs_readelf
def test_the_binary_depends_on_libtorch_alone_and_has_no_path_in_it():
    dynamic = readelf("--dynamic")
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    assert [name for name in needed if not re.fullmatch(SYSTEM, name)] == ["libtorch.so"]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@needs_readelf
def test_the_binary_uses_only_the_stable_abis_of_torch_and_python():
    symbols = [line.split()[7].split("@")[0] for line in readelf("--dyn-syms").splitlines()
               if " UND " in line and len(line.split()) > 7]  # fmt: skip
    assert any(name.startswith("aoti_torch_") for name in symbols)
    for name in symbols:
        assert not re.match(r"_ZN?K?(2at|3c10|5torch|St.*3c10)", name), name
    of_python = {name for name in symbols if name.startswith(("Py", "_Py"))}
    assert of_python == {"PyModule_Create2"}


@pytest.mark.parametrize("damage", ["missing", "not a library"])
def test_a_broken_binary_is_an_import_error_that_says_what_to_do(damage, tmp_path):
    copy = tmp_path / "tvmf_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if damage == "not a library":
        (copy / "_C.abi3.so").write_bytes(b"\x7fELF, but no more of it")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        # An editable install would lend its own library to the copy that lacks one.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "try:\n    import tvmf_ext\n"
        "except ImportError as error:\n    print(error)\n"
        "else:\n    print('imported', tvmf_ext.__file__)\n"
    )
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tvmf_ext: the compiled library cannot be loaded" in result.stdout
    assert "pip install" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
