"""python -m benchmarks: run, report, cases."""

from .pinning import pin_threads

pin_threads()

import torch  # noqa: E402, F401 (before anything else that brings an OpenMP runtime)

from .command import main  # noqa: E402

raise SystemExit(main())
