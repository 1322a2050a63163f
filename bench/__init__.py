"""What the fused head saves: python -m bench, bench.end_to_end, bench.scaling, bench.train."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, before torch is imported
