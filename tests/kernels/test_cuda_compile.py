"""nvcc compiles csrc/ for every generation of GPUs; what it makes is read from its log and from the machine code."""

import nvcc_build
import pytest
from nvcc_build import Resources, machine_code, resources, table

from memflow_kernels.cuda.builder import source_folder

# Ampere, Ada, Hopper. On Blackwell the largest attention kernel spills a few registers: the table shows how many.
WITHOUT_SPILLS = ("8.0", "8.6", "8.9", "9.0a")
ARCHITECTURES = [*WITHOUT_SPILLS, *(pytest.param(name, marks=pytest.mark.slow) for name in ("10.0a", "12.0a"))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(tmp_path_factory, architecture):
    """No attention kernel spills; products run on the tensor cores and keys and values are copied asynchronously."""
    folder = nvcc_build.build(tmp_path_factory, architecture)
    rows = resources((folder / "build.log").read_text())
    print(f"\n{architecture}\n{table(rows)}")
    assert {row.file for row in rows} == {path.stem for path in source_folder().glob("*.cu")}
    if architecture in WITHOUT_SPILLS:
        assert not [row for row in rows if row.spilled and row.file in ("attention", "combine")]
    codes = machine_code(folder / "attention.o")
    assert set(codes) == {row.kernel for row in rows if row.file == "attention"}
    assert all("HMMA" in code for code in codes.values())  # mma.sync
    # cp.async, but for rows that do not begin at multiples of 16 bytes: the kernels whose last parameter is false
    assert {name for name, code in codes.items() if "LDGSTS" in code} == {name for name in codes if "ELb1EEEv" in name}


def test_resources_are_read_from_the_log():
    log = """
[1/2] nvcc --threads 1 -c /csrc/means.cu -o means.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4sumsIfEvPKf' for 'sm_80'
ptxas info    : Function properties for _Z4sumsIfEvPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 128 bytes smem, 449 bytes cmem[0]
[2/2] nvcc --threads 1 -c /csrc/attention.cu -o attention.o
ptxas info    : Compiling entry function '_Z6spillsv' for 'sm_80'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, 352 bytes cmem[0]
"""
    rows = resources(log)
    assert rows == [
        Resources("means", "_Z4sumsIfEvPKf", 48, 0, 128),
        Resources("attention", "_Z6spillsv", 255, 24, 0),
    ]
    assert table(rows).splitlines()[2].split()[:4] == ["means", "48", "0", "128"]
