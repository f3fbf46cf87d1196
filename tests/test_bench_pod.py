"""The pod benchmark: loops counted as often as they run, memory, collectives and the roofline."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_pod, roofline

# Two loops, one inside the other, of which the inner says its length and the outer's is in its
# condition; %a is in on-chip memory, S(1).
HLO = """HloModule example, is_scheduled=true

%inner_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  %sum = f32[4]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[4]{0:T(128)}) tuple(%i, %sum)
}

%inner_condition (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%outer_body (o: (s32[], f32[4])) -> (s32[], f32[4]) {
  %o = (s32[], f32[4]{0}) parameter(0)
  ROOT %w = (s32[], f32[4]{0}) while(%o), condition=%inner_condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"}}
}

%outer_condition (c: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %c = (s32[], f32[4]{0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%n, %limit), direction=LT
}

%fused (f: bf16[8,2]) -> bf16[8,2] {
  %f = bf16[8,2]{1,0} parameter(0)
  ROOT %neg = bf16[8,2]{1,0} negate(%f)
}

ENTRY %main (arg: (s32[], f32[4]), b: bf16[8,2]) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  %a = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} fusion(%b), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (s32[], f32[4]{0}) while(%arg), condition=%outer_condition, body=%outer_body
}
"""


def test_loops_count_as_often_as_they_run():
    cost = roofline.program_cost(HLO)
    # The fusion moves 32 bytes in and 32 out, of which 32 on chip; the all-reduce 16 and 16.
    assert cost.bytes == 64 + 15 * 32
    assert cost.bytes_loops_once == 64 + 32
    assert cost.hbm_bytes == 32 + 15 * 32
    assert cost.cycles == 100
    assert cost.collectives == {"all-reduce": {"count": 15, "bytes": 15 * 16, "asynchronous": 0}}


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match=r"trips of out must be known"):
        roofline.program_cost(HLO.replace("direction=LT", "direction=NE"))


def test_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        roofline.program_cost("HloModule empty")


def test_a_compiled_loop_moves_its_body_once_per_trip():
    @jax.jit
    def power(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.tanh(x @ y), x)

    compiled = power.lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    cost = roofline.program_cost(compiled.as_text())
    product = 3 * 64 * 64 * 4
    assert cost.bytes - cost.bytes_loops_once >= 6 * product
    assert cost.bytes - cost.bytes_loops_once < 6 * 2.5 * product


def test_an_all_reduce_takes_its_closed_form():
    sums = {"all-reduce": {"count": 1, "bytes": 10**9, "asynchronous": 0}}
    chip = roofline.V5E._replace(hop_seconds=0.0)
    # A full torus sends 200 GB/s; each byte is sent twice, once to be summed, once to be shared.
    ring = roofline.collective_seconds(sums, (16, 16), chip)
    assert ring == pytest.approx(2 * 1e9 * 255 / 256 / 200e9)
    # Shorter sides are no rings: half of the links.
    assert roofline.collective_seconds(sums, (2, 2), chip) == pytest.approx(2 * 0.75e9 / 100e9)
    hops = roofline.collective_seconds({"all-reduce": {"count": 3, "bytes": 0}}, (16, 16), CHIP)
    assert hops == pytest.approx(3 * 2 * 16e-6)
    assert roofline.collective_seconds(sums, (1, 1), CHIP) == 0.0


CHIP = roofline.V5E


def test_the_estimate_is_the_larger_of_compute_and_memory_time():
    cost = roofline.Cost(0, int(CHIP.hbm_bandwidth), 0, 0, {})
    bound = roofline.estimate(3 * CHIP.flops, cost, (2, 2), CHIP)
    assert bound["estimated_step_seconds_overlapped"] == pytest.approx(3.0)
    assert bound["estimated_step_seconds_nothing_overlapped"] == pytest.approx(4.0)
    assert bound["estimated_efficiency_not_overlapped"] == 1.0
    assert all(name.startswith("estimated_") for name in bound)


@pytest.fixture(scope="module")
def smoke_cell():
    smoke = bench_pod.PRESETS["smoke"]
    program = dataclasses.replace(
        smoke.programs["wrn_10_1"], model={"name": "small_cnn"}, shape=(12, 12, 1), batch=4
    )
    return bench_pod.cell(program, smoke, (2, 1)), program


def test_a_step_of_two_devices_reduces_every_gradient_once(smoke_cell):
    metrics, program = smoke_cell
    model = bench_pod.jr.models.build(**program.model)
    shapes = jax.eval_shape(lambda key: model.init(key, program.shape), jax.random.key(0))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    reduced = metrics["collectives"]["all-reduce"]["bytes"]
    # Besides the gradients, loss and accuracy.
    assert gradients < reduced <= gradients + 64


def test_our_counts_agree_with_the_compiler_where_it_counts_loops_once(smoke_cell):
    metrics, _ = smoke_cell
    ours, theirs = metrics["bytes_accessed_loops_once"], metrics["xla_bytes_accessed_loops_once"]
    assert ours == pytest.approx(theirs, rel=0.1)
    assert metrics["bytes_accessed"] > 1.2 * ours
    assert metrics["flops"] > 1.5 * metrics["flops_loops_once"]
    assert metrics["fits"]
    assert metrics["needed_bytes"] >= metrics["argument_bytes"]


def test_float32_products_at_highest_precision_cost_six_passes():
    smoke = bench_pod.PRESETS["smoke"]
    program = dataclasses.replace(
        smoke.programs["wrn_10_1"], model={"name": "small_cnn"}, shape=(12, 12, 1), batch=4
    )
    mesh = bench_pod.mesh_of("cpu", (1, 1))

    def passes(**options):
        counts = bench_pod.flop_counts(dataclasses.replace(program, **options), smoke, mesh)
        return counts["product_flops_in_bfloat16_passes"], counts

    least, counts = passes()
    assert least == counts["product_flops"]
    assert passes(precision="highest")[0] == 6 * counts["product_flops"]
    mixed = passes(precision="highest", dtype="bfloat16")[0]
    assert mixed == least + 5 * counts["attack_product_flops"]


def test_a_missing_tpu_compiler_gives_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(bench_pod.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'jax\[tpu\]=="):
        bench_pod.require_libtpu()


def test_a_program_too_large_is_a_result_and_another_error_is_not():
    message = "RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    found = roofline.too_large(RuntimeError(message))
    assert found == {"fits": False, "needed_bytes": int(20.5 * 2**30)}
    with pytest.raises(RuntimeError, match="something else"):
        roofline.too_large(RuntimeError("something else"))


def test_every_platform_is_given_the_same_reductions():
    # What a lowering for accelerators does wrong does not show on a CPU: lower for them from here.
    smoke = bench_pod.PRESETS["smoke"]
    program = dataclasses.replace(
        smoke.programs["wrn_10_1"], model={"name": "small_cnn"}, shape=(12, 12, 1), batch=4
    )
    step, state, batch = bench_pod.mapped_step(program, smoke, bench_pod.mesh_of("cpu", (2, 1)))
    traced = jax.jit(step).trace(state, batch)
    counts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("all_reduce")
        for platform in ("cpu", "tpu", "cuda")
    }
    assert counts["cpu"] > 0
    assert counts["tpu"] == counts["cuda"] == counts["cpu"]
