"""Tests how the package builds, what it says where it cannot, and what was built."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import tvmf_ext
from tvmf_ext import _C, build_info

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(tvmf_ext.__file__).parent
SYSTEM = r"(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s|ld-linux\S*)\.so.*"
needs_readelf = pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")


def readelf(*options):
    command = ["readelf", "--wide", *options, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(*command, cwd, **variables):
    """Runs a program with these environment variables; None removes one."""
    env = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def python(*arguments, cwd):
    return run(sys.executable, *arguments, cwd=cwd)


def program(folder, name, text):
    """Writes a shell script that stands for a program of the build."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_build_info_tells_what_runs():
    info = build_info()
    assert info.version == version("tvmf_ext")
    assert info.torch == torch.__version__
    assert info.cpu in ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    assert info.stable_abi == "2.11"
    assert info.cuda == bool(info.cuda_archs)
    assert all(re.fullmatch(r"\d+\.\d", arch) for arch in info.cuda_archs)
    text = str(info)
    assert ("no CUDA (" in text) == (not info.cuda)
    assert info.no_cuda in (("",) if info.cuda else ("TVMF_CUDA=0", "no working nvcc was found"))
    assert info.cpu in text
    assert info.version in text


# The command line, `python -m tvmf_ext`.


def command_line(monkeypatch, capsys, *arguments):
    """The exit status and the two outputs."""
    monkeypatch.setattr(sys, "argv", ["tvmf_ext", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("tvmf_ext", run_name="__main__")
    return end.value.code, *capsys.readouterr()


def test_running_the_package_prints_the_build_and_checks_it(monkeypatch, capsys):
    status, out, _ = command_line(monkeypatch, capsys)
    assert status == 0
    assert str(build_info()) in out
    assert re.search(r"self-check: relative error .*: ok", out)


def test_the_command_line_knows_info_version_help_and_plan(monkeypatch, capsys):
    assert command_line(monkeypatch, capsys, "info") == (0, f"{build_info()}\n", "")
    assert command_line(monkeypatch, capsys, "--version") == (
        0,
        f"tvmf_ext {tvmf_ext.__version__}\n",
        "",
    )
    status, out, _ = command_line(monkeypatch, capsys, "--help")
    assert status == 0
    assert "self-check" not in out
    assert all(word in out for word in ("usage: python -m tvmf_ext", "info", "plan", "--version"))
    sizes = ("256", "8142", "2048")
    status, out, _ = command_line(monkeypatch, capsys, "plan", *sizes, "--gpu", "H200")
    assert status == 0
    assert "H200" in out


@pytest.mark.parametrize(
    "arguments",
    [["foo"], ["--foo"], ["info", "foo"], ["plan", "256"], ["plan", "1", "1", "1", "--gpu", "foo"]],
)
def test_the_command_line_refuses_what_it_does_not_know(arguments, monkeypatch, capsys):
    status, out, err = command_line(monkeypatch, capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("usage: python -m tvmf_ext")
    assert "error: " in err.splitlines()[-1]


def test_importing_without_numpy_prints_nothing(tmp_path):
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "sys.modules['numpy'] = None\n"  # an import of it fails
        "import tvmf_ext, torch\n"
        "print(torch.tensor([1.0]))\n"
    )
    result = python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "tensor([1.])\n", "")


# The messages of setup.py where something that the build needs is missing.


SETUP = """
import runpy, sys, sysconfig, types
import setuptools
folder = {folder!r}
real = sysconfig.get_path
paths = dict(scripts=folder)
sysconfig.get_path = lambda name: paths.get(name) or real(name)
sys.modules["torch"] = types.SimpleNamespace(__version__="2.14.1", __file__="/torch/__init__.py")
sys.argv = ["setup.py", {command!r}]
{change}
runpy.run_path({setup!r}, run_name="__main__")
"""


@pytest.fixture
def setup(tmp_path):
    """Runs a copy of setup.py in a place that has what the build needs and nothing else."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    folder = tmp_path / "programs"
    folder.mkdir()
    program(folder, "cmake", "echo cmake version 4.4.4")
    program(folder, "ninja", "echo 1.13.2")
    program(folder, "c++", "exit 0")

    def call(command="bdist_wheel", change="", CXX=None):
        code = SETUP.format(
            folder=str(folder), command=command, change=change, setup=str(checkout / "setup.py")
        )
        return run(sys.executable, "-c", code, cwd=checkout, PATH=str(folder), CXX=CXX)

    call.folder = folder
    return call


def missing(name):
    return lambda folder: (folder / name).unlink()


def replaced(name, text):
    return lambda folder: program(folder, name, text)


def unchanged(folder):
    pass


TOO_OLD_GCC = "echo \"c++: error: unrecognized option '-std=c++20'\" >&2; echo '  ^~~~' >&2; exit 1"


@pytest.mark.parametrize(
    ("programs", "options", "problem", "remedy"),
    [
        (unchanged, {"change": "setuptools.__version__ = '65.5.0'"},
         "setuptools >= 77 is needed to build, got 65.5.0", "pip install 'setuptools>=77'"),
        (unchanged, {"change": "sys.modules['torch'] = None"},
         "torch >= 2.11 is needed to build, and `import torch` fails", "pip install 'torch>=2.11'"),
        (unchanged, {"change": "sys.modules['torch'].__version__ = '2.9.1+cu130'"},
         "torch >= 2.11 is needed to build, got 2.9.1+cu130", "pip install 'torch>=2.11'"),
        (missing("cmake"), {}, "cmake is needed", "pip install 'cmake>=3.25'"),
        (replaced("cmake", "echo cmake version 3.18.4"), {},
         "cmake >= 3.25 is needed to build, got 3.18.4", "pip install 'cmake>=3.25'"),
        (replaced("cmake", "echo No module named cmake; exit 1"), {},
         "cmake --version fails: No module named cmake", "pip install 'cmake>=3.25'"),
        (missing("ninja"), {}, "ninja is needed", "pip install ninja"),
        (missing("c++"), {}, "a C++ compiler is needed", "apt install g++"),
        (unchanged, {"CXX": "/nowhere/g++"}, "got /nowhere/g++", "set CXX"),
        (unchanged, {"CXX": "/bin/false -m64"},
         "/bin/false -m64 does not compile C++20, and prints nothing", "set CXX"),
        (replaced("c++", TOO_OLD_GCC), {},
         "does not compile C++20: c++: error: unrecognized option '-std=c++20'. ", "GCC 12"),
        (unchanged, {"change": "paths['include'] = folder"},
         "Python.h does not exist", "apt install python3-dev"),
    ],
    ids=["setuptools 65", "no torch", "torch 2.9", "no cmake", "cmake 3.18", "broken cmake",
         "no ninja", "no compiler", "no such CXX", "CXX fails", "old compiler", "no Python.h"],
)  # fmt: skip
def test_something_that_the_build_lacks_is_said_in_one_line(
    setup, programs, options, problem, remedy
):
    programs(setup.folder)
    result = setup(**options)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("tvmf_ext: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert problem in result.stderr
    assert remedy in result.stderr


def test_an_error_of_cmake_is_the_last_line(setup):
    cmake = """
if [ "$1" = --version ]; then echo cmake version 4.4.4; exit; fi
echo "-- The CXX compiler identification is unknown"
printf 'CMake Error at CMakeLists.txt:1 (message):\\n  Two lines\\n  of reason\\n\\n\\n' >&2
exit 1"""
    stack = r"\nCall Stack (most recent call first):\n  CMakeLists.txt:1 (f)\n\n\n"
    for text in (cmake, cmake.replace(r"\n\n\n", r"\n" + stack)):
        program(setup.folder, "cmake", text)
        result = setup("build_ext")
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == (
            "tvmf_ext: CMake cannot configure the build: Two lines of reason"
        )
    assert "Traceback" not in result.stderr


def test_setup_checks_the_versions_of_pyproject():
    needed = runpy.run_path(str(ROOT / "setup.py"))["NEEDED"]
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert dict(re.findall(r'"(\w+)>=([\d.]+)"', requires)) == needed
    assert re.findall(r'"(\w+)"', requires) == ["ninja"]


def test_metadata_needs_no_compiler(setup):
    for name in ("cmake", "ninja", "c++"):
        (setup.folder / name).unlink()
    result = setup("--version", change="sys.modules['torch'] = None")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == version("tvmf_ext")


# CUDA: which architectures are compiled, and what is said about an nvcc that does not work.


def cmake_script(folder, *lines, **variables):
    """Runs lines after cmake/cuda.cmake, without a project."""
    script = folder / "script.cmake"
    script.write_text("\n".join([f'include("{ROOT}/cmake/cuda.cmake")', *lines]))
    return run(shutil.which("cmake"), "-P", script, cwd=folder, **variables)


def cuda_archs(folder, requested, nvcc="/nowhere"):
    result = cmake_script(
        folder,
        f'tvmf_cuda_archs(archs "{nvcc}")',
        'message("archs=${archs}")',
        TORCH_CUDA_ARCH_LIST=requested,
    )
    archs = re.search("^archs=(.*)$", result.stderr, re.MULTILINE)
    return archs and archs[1].split(";"), result.stdout + " ".join(result.stderr.split())


@needs_cmake
@pytest.mark.parametrize(
    ("requested", "archs"),
    [
        (None, ["80-real", "90a-real", "90-virtual"]),
        ("", ["80-real", "90a-real", "90-virtual"]),
        ("9.0", ["90a-real"]),
        ("9.0a", ["90a-real"]),
        ("8.0;9.0;9.0a", ["80-real", "90a-real"]),
        ("9.0+PTX", ["90a-real", "90-virtual"]),
        ("9.0a+PTX", ["90a-real", "90-virtual"]),
        ("8.6, 10.0a+PTX 12.0f+PTX",
         ["86-real", "100a-real", "100-virtual", "120f-real", "120-virtual"]),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX",
         ["80-real", "86-real", "90a-real", "100-real", "120-real", "120-virtual"]),
    ],
)  # fmt: skip
def test_hopper_is_always_9_0a_and_ptx_always_of_a_plain_target(requested, archs, tmp_path):
    assert cuda_archs(tmp_path, requested)[0] == archs


@needs_cmake
def test_capabilities_below_8_are_left_out_with_one_line(tmp_path):
    _, text = cuda_archs(tmp_path, "7.0 7.5+PTX 8.0")
    assert "7.0, 7.5+PTX of TORCH_CUDA_ARCH_LIST is left out" in text.splitlines()[0]
    assert len(text.splitlines()) == 2


@needs_cmake
@pytest.mark.parametrize(
    ("requested", "wanted"),
    [("Hopper", "such as 8.0"), ("9", "such as 8.0"), ("7.0;7.5", "8.0 or newer")],
)
def test_a_wrong_list_of_capabilities_is_an_error(requested, wanted, tmp_path):
    archs, text = cuda_archs(tmp_path, requested)
    assert archs is None
    assert f"TORCH_CUDA_ARCH_LIST: got '{requested}'" in text
    assert wanted in text


@needs_cmake
def test_a_capability_that_the_toolkit_does_not_know_is_an_error(tmp_path):
    nvcc = program(tmp_path, "nvcc", "echo compute_80; echo compute_90; echo compute_90a")
    assert cuda_archs(tmp_path, "8.0 9.0+PTX", nvcc)[0] == ["80-real", "90a-real", "90-virtual"]
    archs, text = cuda_archs(tmp_path, "8.0 10.0", nvcc)
    assert archs is None
    assert f"got '10.0', for which {nvcc} cannot compile" in text


def find_nvcc(folder, **variables):
    variables = {"CUDA_HOME": None, "CUDA_PATH": None, "CUDACXX": None, **variables}
    result = cmake_script(
        folder,
        "tvmf_find_nvcc(nvcc problem)",
        'message("${nvcc}|${problem}")',
        PATH=str(folder),
        **variables,
    )
    return result.stderr.removesuffix("\n").split("|")


NVCC_WITH_A_NEW_GCC = """
echo "host_config.h:143:2: error: #error -- unsupported GNU version! gcc 15 is too new" >&2
echo "  143 | #error" >&2
echo "      |  ^~~~~" >&2
exit 1"""


@needs_cmake
def test_an_nvcc_that_fails_is_named_with_what_it_printed(tmp_path):
    assert find_nvcc(tmp_path)[0] == ""
    assert find_nvcc(tmp_path)[1].startswith("no nvcc was found")
    assert find_nvcc(tmp_path, CUDACXX="/bin/false") == [
        "",
        "/bin/false does not compile an empty program: it ended with 1 and printed nothing",
    ]
    assert find_nvcc(tmp_path, CUDACXX="/nope")[1].startswith("/nope does not run: ")
    program(tmp_path, "nvcc", NVCC_WITH_A_NEW_GCC)
    assert "#error -- unsupported GNU version! gcc 15 is too new'" in find_nvcc(tmp_path)[1]
    good = tmp_path / "cuda" / "bin"
    good.mkdir(parents=True)
    nvcc = program(good, "nvcc", "exit 0")
    assert find_nvcc(tmp_path, CUDA_HOME=str(good.parent)) == [str(nvcc), ""]


def configure(folder, **variables):
    variables = {"TORCH_CUDA_ARCH_LIST": None, **variables}
    return run(
        shutil.which("cmake"), "-S", ROOT, "-B", folder / "build", "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DTVMF_OUTPUT_DIR={folder}",
        f"-DTVMF_TORCH_DIR={Path(torch.__file__).parent}",
        cwd=folder, **variables,
    )  # fmt: skip


def commands_of(folder):
    return (folder / "build" / "compile_commands.json").read_text()


@needs_cmake
def test_tvmf_cuda_1_fails_where_nvcc_does(tmp_path):
    result = configure(tmp_path, TVMF_CUDA="1", CUDACXX="/bin/false")
    assert result.returncode == 1
    assert "TVMF_CUDA=1, but /bin/false does not compile" in " ".join(result.stderr.split())


@needs_cmake
def test_a_failing_nvcc_gives_a_warning_and_a_build_for_the_cpu(tmp_path):
    result = configure(tmp_path, TVMF_CUDA=None, CUDACXX="/bin/false")
    assert result.returncode == 0, result.stderr
    warning = " ".join(result.stderr.split())
    assert "CMake Warning" in warning
    assert "building for the CPU only, because /bin/false does not compile" in warning
    assert "TVMF_NO_CUDA" in commands_of(tmp_path)
    assert "no working nvcc was found" in commands_of(tmp_path)


@needs_cmake
@pytest.mark.skipif(not build_info().cuda or not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize(("requested", "hopper"), [("9.0", True), ("8.0+PTX", False)])
def test_the_kernels_of_hopper_are_compiled_for_9_0a(requested, hopper, tmp_path):
    result = configure(tmp_path, TVMF_CUDA="1", TORCH_CUDA_ARCH_LIST=requested)
    assert result.returncode == 0, result.stderr
    assert ("sm_90a" in commands_of(tmp_path)) == hopper


# The library that was built.


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
    rows = [line.split() for line in readelf("--dyn-syms").splitlines() if " UND " in line]
    symbols = [row[7].split("@")[0] for row in rows if len(row) > 7]
    assert any(name.startswith("aoti_torch_") for name in symbols)
    for name in symbols:
        assert not re.match(r"_ZN?K?(2at|3c10|5torch|St.*3c10)", name), name
    of_python = {name for name in symbols if name.startswith(("Py", "_Py"))}
    assert of_python == {"PyModule_Create2"}


@pytest.mark.skipif(
    not build_info().cuda or torch.cuda.is_available(), reason="needs CUDA kernels and no GPU"
)
def test_a_driver_that_is_too_old_or_missing_is_told_with_the_toolkit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    archs = ", ".join(build_info().cuda_archs)
    with pytest.raises(RuntimeError, match=r"CUDA toolkit \d+\.\d .*TVMF_CUDA=0") as error:
        tvmf_ext.plan(8, 8, 8, device="cuda:0")
    assert f"for compute capabilities {archs};" in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "not a library"])
def test_a_broken_binary_is_an_import_error_that_says_what_to_do(damage, tmp_path):
    copy = tmp_path / "tvmf_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if damage == "not a library":
        (copy / "_C.abi3.so").write_bytes(b"\x7fELF, and then no library")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        # The finder of an editable install would find the library that the copy lacks.
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
