"""The command `python -m tests.simt`."""

import subprocess
import sys


def test_a_missing_package_is_named_in_one_line():
    """An environment of the extra `train` lacks what builds the emulator."""
    program = (
        "import runpy, sys; sys.modules['pybind11'] = None\n"
        "runpy.run_module('tests.simt', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "python -m tests.simt: building the emulator needs pybind11: pip install -e '.[test]'\n"
    )
