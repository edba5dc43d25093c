"""A system that does not let a process use the processor's tiles (AMX), as older kernels and some
containers: there an instruction for tiles ends the process."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_bfloat16
from kernel_forms import HAS_TILES

TESTS = Path(__file__).parent
# A filter of system calls (seccomp) that refuses arch_prctl(ARCH_REQ_XCOMP_PERM, ...) alone.
REFUSE = """
import ctypes, struct, sys
rules = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),
         (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
filter = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(filter))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0):  # PR_SET_SECCOMP, a filter
    sys.exit(77)
assert libc.syscall(158, 0x1023, 18) == -1 and ctypes.get_errno() == 1
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""
PRODUCTS = (
    "test_conv_kernels.py::test_bfloat16_rounds_operands_alone[shape1]",
    "test_muon_kernels.py::test_bfloat16_rounds_the_operands_of_products_alone[shape1]",
    "test_cpu_kernels_bfloat16.py::test_parts_equal_those_in_float32[own-16-1-80-5]",
)


@needs_bfloat16
@pytest.mark.skipif(not HAS_TILES, reason="needs a processor with tiles (AMX)")
def test_products_are_right_where_the_system_refuses_tiles():
    run = subprocess.run(
        [sys.executable, "-c", REFUSE, *(f"{TESTS}/{name}" for name in PRODUCTS)],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    if run.returncode == 77:
        pytest.skip("the system lets no process filter its calls")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
