"""python -m benchmarks: run, report, list, export."""

from .timing import pin_threads

pin_threads()  # before torch starts its threads

from .command import main  # noqa: E402

raise SystemExit(main())
