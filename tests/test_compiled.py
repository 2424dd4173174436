"""Counting what a compiled program does, from its text."""

from __future__ import annotations

import pytest
from benchmarks import compiled, hlo

# As XLA writes them, shortened. A GPU: a kernel, a product, a copy; a loop of 4 trips, whose body has one kernel and
# whose condition is not launched; a loop that ends by a condition; a loop that is a branch in disguise.
GPU = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,8]{1,0}}

FileNames
1 "/somewhere/jaxalign/_rate.py"

FunctionNames
1 "_find"
2 "guess_from"

FileLocations
1 {file_name_id=1 function_name_id=2 line=98 end_line=98 column=12 end_column=90}
2 {file_name_id=1 function_name_id=1 line=254 end_line=254 column=18 end_column=80}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused_add (p.0: f32[8,8], p.1: s32[]) -> f32[8,8] {
  %p.0 = f32[8,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
  %sum.1 = f32[1,8]{1,0} add(%slice.1, %slice.1)
  ROOT %update.1 = f32[8,8]{1,0} dynamic-update-slice(%p.0, %sum.1, %p.1, %zero)
}

%body.1 (s.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %a.1 = f32[8,8]{1,0} get-tuple-element(%s.1), index=1
  %fusion.1 = f32[8,8]{1,0} fusion(%a.1, %i.1), kind=kLoop, calls=%fused_add
  ROOT %t.1 = (s32[], f32[8,8]{1,0}) tuple(%i.1, %fusion.1)
}

%condition.1 (s.2: (s32[], f32[8,8])) -> pred[] {
  %s.2 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %four = s32[] constant(4)
  ROOT %less.1 = pred[] compare(%i.2, %four), direction=LT
}

%body.2 (s.3: (pred[], f32[8,8])) -> (pred[], f32[8,8]) {
  %s.3 = (pred[], f32[8,8]{1,0}) parameter(0)
  %a.3 = f32[8,8]{1,0} get-tuple-element(%s.3), index=1
  %exp.1 = f32[8,8]{1,0} exponential(%a.3)
  %goes_on = pred[] is-finite(%exp.1)
  ROOT %t.3 = (pred[], f32[8,8]{1,0}) tuple(%goes_on, %exp.1)
}

%body.3 (s.4: (pred[], f32[8,8])) -> (pred[], f32[8,8]) {
  %s.4 = (pred[], f32[8,8]{1,0}) parameter(0)
  %a.4 = f32[8,8]{1,0} get-tuple-element(%s.4), index=1
  %exp.2 = f32[8,8]{1,0} exponential(%a.4)
  %no = pred[] constant(false)
  %copy.2 = pred[] copy(%no)
  ROOT %t.4 = (pred[], f32[8,8]{1,0}) tuple(%copy.2, %exp.2)
}

%condition.2 (s.5: (pred[], f32[8,8])) -> pred[] {
  %s.5 = (pred[], f32[8,8]{1,0}) parameter(0)
  ROOT %asked = pred[] get-tuple-element(%s.5), index=0
}

ENTRY %main (x.1: f32[8,4]) -> f32[8,8] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %custom-call.1 = (f32[8,8]{1,0}, s8[1024]{0}) custom-call(%x.1, %x.1), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %d.1 = f32[8,8]{1,0} get-tuple-element(%custom-call.1), index=0
  %nought = s32[] constant(0)
  %copy.1 = s32[] copy(%nought)
  %t.5 = (s32[], f32[8,8]{1,0}) tuple(%copy.1, %d.1)
  %while.1 = (s32[], f32[8,8]{1,0}) while(%t.5), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"4"},"known_init_step":{"init":"0","step":"1"}}
  %a.5 = f32[8,8]{1,0} get-tuple-element(%while.1), index=1
  %yes = pred[] constant(true)
  %t.6 = (pred[], f32[8,8]{1,0}) tuple(%yes, %a.5)
  %while.2 = (pred[], f32[8,8]{1,0}) while(%t.6), condition=%condition.2, body=%body.2, metadata={stack_frame_id=2}
  %while.3 = (pred[], f32[8,8]{1,0}) while(%while.2), condition=%condition.2, body=%body.3
  ROOT %a.6 = f32[8,8]{1,0} get-tuple-element(%while.3), index=1
}
"""

# A TPU: the trips stand in the condition only, a product is a convolution, S(1) is on the chip.
TPU = """\
HloModule jit_f, is_scheduled=true

%body (s: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %s = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %a = f32[16,8]{1,0:T(8,128)S(1)} get-tuple-element(%s), index=1
  %product = f32[16,16]{1,0:T(8,128)} convolution(%a, %a), dim_labels=bf_oi->bf
  %started = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %came = f32[16,8]{1,0:T(8,128)S(1)} collective-permute-done(%started)
  ROOT %t = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) tuple(%i, %came)
}

%condition (s: (s32[], f32[16,8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %s = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %three), direction=LT
}

ENTRY %main (x: f32[16,8]) -> f32[32,8] {
  %x = f32[16,8]{1,0:T(8,128)} parameter(0)
  %copy.9 = f32[16,8]{1,0:T(8,128)S(1)} copy(%x)
  %nought = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) tuple(%nought, %copy.9)
  %while = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) while(%t), condition=%condition, body=%body
  %a = f32[16,8]{1,0:T(8,128)S(1)} get-tuple-element(%while), index=1
  ROOT %every = f32[32,8]{1,0:T(8,128)} all-gather(%a), dimensions={0}
}
"""


def assumed(places, once):
    return 0 if once else {"guess_from": 3}.get(places[-1].function)


def test_launches_and_reads_of_loops():
    block = hlo.count(hlo.parse(GPU), assumed)
    known, unknown, guarded = block.loops
    assert (known.trips, known.known) == (4, True)
    assert [str(place) for place in unknown.places] == ["_find (_rate.py:254)", "guess_from (_rate.py:98)"]
    assert (unknown.trips, unknown.known, unknown.once) == (3, False, False)
    assert (guarded.trips, guarded.once) == (0, True)
    assert block.own.launches == 2  # the product and the copy
    assert block.total.launches == 2 + 4 * 1 + 3 * 2
    assert block.total.reads == 4 + 1  # one more than trips, of loops of unknown length


def test_a_loop_that_nobody_knows_says_so():
    unknown = hlo.count(hlo.parse(GPU)).loops[1]
    assert (unknown.trips, unknown.told) == (1, False)
    assert any("NOT IN THE TABLE" in line for line in hlo.breakdown(hlo.count(hlo.parse(GPU))))


def test_bytes_and_operations():
    module = hlo.parse(GPU)
    block = hlo.count(module, assumed)
    product = 2 * 8 * 4 * 4 + 8 * 8 * 4  # without the room that it works in
    assert block.own.bytes == product + 2 * 4
    row = 8 * 4
    assert block.loops[0].each.bytes == row + 4 + row  # a row and its number are read, a row is written in place
    assert block.own.flops == 2 * 8 * 8 * 4
    assert block.loops[0].each.flops == 8
    assert block.total.products == 1
    assert hlo.largest(module) == 1024
    assert not hlo.has_type(module, "f64")
    assert hlo.has_type(hlo.parse(GPU.replace("f32[8,4]", "f64[8,4]")), "f64")


def test_tpu():
    module = hlo.parse(TPU)
    block = hlo.count(module)
    assert (block.loops[0].trips, block.loops[0].known) == (3, True)
    assert block.total.products == 3
    assert block.total.flops == 3 * 2 * 16 * 16 * 8
    assert block.total.collectives == {"collective-permute": 3, "all-gather": 1}
    assert block.total.sent == {"collective-permute": 3 * 16 * 8 * 4, "all-gather": 32 * 8 * 4}
    assert hlo.gathered(module) == 32 * 8 * 4
    assert block.kernels["copy f32[128]"] == 1
    copied = 16 * 8 * 4  # read from far away, written on the chip
    assert block.own.bytes == copied + 32 * 8 * 4


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[2,3]{1,0}", 24), ("(pred[], /*index=1*/bf16[4]{0:T(256)(128)(2,1)})", 9), ("f32[]", 4), ("token[]", 0)],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.bytes_of(shape) == size


def measured(**facts):
    return compiled.Measured(**{"program": "sigma", "target": "8 x H100", "devices": 8, **facts})


def test_memory_has_to_fall_with_the_number_of_devices():
    two = measured(devices=2, arguments=100, temporaries=50)
    assert compiled.not_falling([measured(arguments=25, temporaries=50), two]) == []
    (failure,) = compiled.not_falling([measured(arguments=100, temporaries=50), two])
    assert "sigma: memory of a device does not fall" in failure
    assert compiled.not_falling([two, measured(), measured(program="cka", arguments=200)]) == []  # did not compile


def test_limits(monkeypatch):
    monkeypatch.setattr(compiled, "LIMITS", {"sigma": (10, 2, 0.5)})
    assert compiled.above_limits(measured(launches=10, reads=2, bytes=0.5e9)) == []
    assert len(compiled.above_limits(measured(launches=11, reads=3, bytes=0.6e9))) == 3
    assert compiled.above_limits(measured(target="2 x H100", launches=11, reads=3)) == []
    assert compiled.above_limits(measured(program="cka", launches=11, reads=3)) == []


@pytest.mark.parametrize(
    ("text", "n", "reason"),
    [
        (GPU, None, None),
        (GPU, 40, None),
        (GPU, 30, "stores 1024 numbers"),
        (GPU.replace("f32[8,4]", "f64[8,4]"), None, "float64"),
        (TPU, 1000, None),
        (TPU.replace("f32[32,8]", "f32[32,8000]"), 1000, "gathers 1.02 MB"),
    ],
)
def test_promises(text, n, reason):
    program = compiled.Program("any", lambda where: None, n=n, width=8)
    failures = compiled.broken_promises(program, compiled.Where("one", (None,)), hlo.parse(text))
    assert (failures == []) if reason is None else reason in failures[0]
