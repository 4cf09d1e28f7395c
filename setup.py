"""Adds what pyproject.toml cannot say: the sources in csrc/ travel along, and are compiled where that is asked for.

`pip wheel .` makes a wheel of Python files, which needs no torch and no compiler. With MEMFLOW_BUILD_CUDA=1 in the
environment, and --no-build-isolation so that the torch here is seen, the wheel holds the compiled kernels too.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SWITCH = "MEMFLOW_BUILD_CUDA"


class WithSources(build_py):
    """csrc/ lies beside the packages here, and inside memflow_kernels in a wheel, for builds at first use."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "memflow_kernels", "csrc")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(ROOT / "csrc", target)


class WithKernels(build_ext):
    def build_extension(self, extension):
        sys.path.insert(0, str(ROOT / "memflow_kernels" / "cuda"))
        import builder  # without the package around it, which needs torch and more

        try:
            recipe = builder.Recipe.here(builder.find_toolchain())
            with tempfile.TemporaryDirectory() as folder:
                library = builder.compile_library(recipe, Path(folder), "memflow_cuda.so")
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(library, target)
        except builder.BuildError as error:
            raise SystemExit(f"{SWITCH}: the CUDA kernels were not built: {error}") from None


commands = {"build_py": WithSources, "build_ext": WithKernels}
switch = os.environ.get(SWITCH, "0")
if switch not in ("0", "1", ""):
    raise SystemExit(f"{SWITCH} must be 0 or 1, got {switch!r}")
if switch == "1":
    # py_limited_api: the library uses nothing of Python, so that one wheel serves 3.10 and all that follow
    kernels = Extension("memflow_kernels.cuda.memflow_cuda", sources=[], py_limited_api=True)
    setup(cmdclass=commands, ext_modules=[kernels], options={"bdist_wheel": {"py_limited_api": "cp310"}})
else:
    setup(cmdclass=commands)
