"""The benchmark `python -m bench`, and its other commands, each a file beside this one.

suite.py says what is measured and variants.py what is compared. measure/ takes times, memory and
errors; show/ prints, draws and saves them and writes them into the documents.
"""

import importlib.util
import os

# torch's profiler prints warnings unless this is set before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
if importlib.util.find_spec("rich") is None:
    raise SystemExit("error: the benchmark needs the package rich: pip install -e '.[train]'")
