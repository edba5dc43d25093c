"""What a TPU step is estimated at where the compiler's schedule cannot be right."""

from coca_jax.estimate import chips, tpu

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
