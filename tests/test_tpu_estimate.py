"""What a TPU step is estimated at where the compiler's schedule cannot be right."""

import types

import jax
import pytest

from coca_jax.estimate import chips, compiled, tpu

PRODUCT = """HloModule m, is_scheduled=true

%fused.1 (a: bf16[4096,1024], b: bf16[1024,4096]) -> bf16[4096,4096] {
  %a = bf16[4096,1024]{1,0} parameter(0)
  %b = bf16[1024,4096]{1,0} parameter(1)
  ROOT %y = bf16[4096,4096]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[4096,1024], w: bf16[1024,4096]) -> bf16[4096,4096] {
  %x = bf16[4096,1024]{1,0} parameter(0)
  %w = bf16[1024,4096]{1,0} parameter(1)
  ROOT %out.1 = bf16[4096,4096]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused.1, backend_config={"estimated_cycles":"90000"}
}
"""  # noqa: E501


def test_bundles_that_would_beat_the_peak_are_not_counted():
    """4096 x 1024 x 4096 takes v6e 65,536 cycles at least: 4 x 256 x 256 products a cycle."""
    chip = chips.TPUS["v6e"]
    least = 2 * 4096 * 1024 * 4096 / chip.peak * chip.hertz
    assert round(least) == 65536

    def found(bundles):
        return tpu.analyse(PRODUCT, chip, (1,), 1, 1e9, {"out.1": bundles})

    assert found(70_000)["scheduled_cycles"] == 70_000
    assert found(2_000)["scheduled_cycles"] == 90_000 and not found(2_000)["scheduled_share"]


def test_a_program_that_jaxlib_cannot_parse_is_read_from_the_compiler_s_dump(tmp_path):
    """As it is on chips with a SparseCore: the one file of the step behind code generation."""

    def as_text():
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: unknown opcode")

    program = types.SimpleNamespace(as_text=as_text)
    for name in ("0001.jit_other.after_codegen", "0002.jit_train_step.before_optimizations"):
        (tmp_path / f"{name}.txt").write_text("another")
    with pytest.raises(jax.errors.JaxRuntimeError, match="unknown opcode"):
        compiled.optimised_text(program, str(tmp_path))
    (tmp_path / "0002.jit_train_step.after_codegen.txt").write_text(PRODUCT)
    assert compiled.optimised_text(program, str(tmp_path)) == PRODUCT
