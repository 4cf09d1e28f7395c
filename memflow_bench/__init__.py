"""The benchmark harness: correct first, then timed, against every peer on this machine. See docs/benchmarks.md."""
