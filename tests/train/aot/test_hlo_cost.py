"""Costs read from compiled programs and from schedules of kernels, against numbers by hand."""

import pytest

pytest.importorskip("grain")
from train.aot.hlo_cost import Collective, HloError, array_bytes, cost, parse
from train.aot.kernel_schedules import bundles, count, lookup_cycles, scheduled_cycles

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
PROGRAM = f"""HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}}

%fused_product (p0: bf16[8,16], p1: bf16[16,4]) -> f32[8,4] {{
  %p0 = bf16[8,16]{{1,0:T(8,128)(2,1)}} parameter(0)
  %p1 = bf16[16,4]{{1,0}} parameter(1)
  ROOT %convolution.1 = f32[8,4]{{1,0}} convolution(%p0, %p1), dim_labels=bf_io->bf
}}

%fused_sum (p: f32[8,4]) -> f32[8] {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce.1 = f32[8]{{0}} reduce(%p, %zero), dimensions={{1}}, to_apply=%sum
}}

%inner_condition (state: (s32[], bf16[8,16])) -> pred[] {{
  %count.inner = s32[]{{:T(128)}} constant(24), metadata={{op_name="x"}}
  %state = (s32[]{{:T(128)}}, bf16[8,16]{{1,0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%i, %count.inner), direction=LT
}}

%inner_body (state.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %state.1 = (s32[], bf16[8,16]) parameter(0)
  %x = bf16[8,16] get-tuple-element(%state.1), index=1
  %w = bf16[16,4] constant(0)
  %product = f32[8,4]{{1,0}} fusion(%x, %w), kind=kOutput, calls=%fused_product, {CYCLES % 1000}
  %total = f32[8]{{0}} fusion(%product), kind=kInput, calls=%fused_sum, {CYCLES % 10}
  %ours.3 = bf16[8,16]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={{"body":"a
b"}}
  ROOT %next = (s32[], bf16[8,16]) tuple(%x, %x)
}}

%outer_body (state.2: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {{
  %state.2 = (s32[], bf16[8,16]) parameter(0)
  %while.2 = (s32[], bf16[8,16]) while(%state.2), condition=%inner_condition, body=%inner_body
  %shard = bf16[64,16]{{1,0}} constant(0)
  %gathered = bf16[256,16]{{1,0}} all-gather(%shard), channel_id=1, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  ROOT %copy.1 = (s32[], bf16[8,16]) copy(%while.2), {CYCLES % 5}
}}

%outer_condition (state.3: (s32[], bf16[8,16])) -> pred[] {{
  %state.3 = (s32[], bf16[8,16]) parameter(0)
  ROOT %less = pred[] fusion(%state.3), kind=kLoop, calls=%compared
}}

%compared (state.4: (s32[], bf16[8,16])) -> pred[] {{
  %three = s32[] constant(3)
  ROOT %lt.2 = pred[] compare(%three, %three), direction=LT
}}

%starts (p.1: s32[8]) -> (s32[8], s32[128]) {{
  %p.1 = s32[8]{{0}} parameter(0)
  %all-gather.9 = s32[128]{{0}} all-gather(%p.1), channel_id=2, replica_groups=[1,16]<=[16], dimensions={{0}}
  ROOT %custom-call.1 = (s32[8], s32[128]) custom-call(%all-gather.9), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (p.2: s32[8]) -> s32[128] {{
  %p.2 = s32[8]{{0}} parameter(0)
  ROOT %all-gather.10 = s32[128]{{0}} all-gather(%p.2), channel_id=2, replica_groups=[1,16]<=[16], dimensions={{0}}
}}

%ends (p.3: s32[8]) -> s32[128] {{
  %p.3 = s32[8]{{0}} parameter(0)
  %all-gather.11 = s32[128]{{0}} all-gather(%p.3), channel_id=2, replica_groups=[1,16]<=[16], dimensions={{0}}
  ROOT %custom-call.2 = s32[128] custom-call(%all-gather.11), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {{
  %input = f32[64,8]{{1,0}} parameter(0)
  %all-reduce.1 = f32[64,8]{{1,0}} all-reduce(%input), channel_id=4, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%sum
  %index = u32[] constant(0)
  ROOT %part = f32[16,8]{{1,0}} dynamic-slice(%all-reduce.1, %index, %index), dynamic_slice_sizes={{16,8}}
}}

ENTRY %main (start: (s32[], bf16[8,16])) -> f32[100] {{
  %start = (s32[], bf16[8,16]) parameter(0)
  %while.1 = (s32[], bf16[8,16]) while(%start), condition=%outer_condition, body=%outer_body
  %numbers = s32[8]{{0}} constant(0)
  %async.1 = (s32[8], s32[128]) fusion(%numbers), kind=kCustom, calls=%starts
  %async.2 = s32[128] fusion(%numbers), kind=kCustom, calls=%async_collective_fusion.1, {CYCLES % 7}
  %async.3 = s32[128] fusion(%numbers), kind=kCustom, calls=%ends
  %kernel = f32[64,8]{{1,0}} constant(0)
  %scattered = f32[16,8]{{1,0}} fusion(%kernel), kind=kCustom, calls=%all-reduce-scatter.1
  %gradient = f32[100]{{0}} constant(0)
  %bias = f32[4]{{0}} constant(0)
  ROOT %psum = (f32[100]{{0}}, f32[4]{{0}}) all-reduce(%gradient, %bias), channel_id=3, replica_groups={{}}, to_apply=%sum
}}
"""


def test_loops_multiply_what_is_in_them():
    found = cost(PROGRAM)
    assert found.cycles == {"matmul": 3 * 24 * 1000, "elementwise": 3 * 24 * 10, "copies": 3 * 5, "communication": 7}
    assert found.kernels == {"ours.3": 3 * 24}
    assert found.estimates.pop("product") == (3 * 24, 1000) and found.estimates.pop("copy.1") == (3, 5)


def test_collectives_are_counted_with_their_bytes():
    assert cost(PROGRAM).collectives == (
        Collective("all-gather", 4, calls=3, bytes=3 * 256 * 16 * 2),
        Collective("all-gather", 16, calls=1, bytes=16 * 8 * 4),  # its three fusions are one
        Collective("all-reduce", 0, calls=1, bytes=(100 + 4) * 4),
        Collective("reduce-scatter", 4, calls=1, bytes=64 * 8 * 4),
    )


def test_the_count_that_the_compiler_knows_comes_first():
    known = PROGRAM.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}')
    assert cost(known).cycles["matmul"] == 3 * 5 * 1000


def test_a_loop_without_a_count_is_an_error():
    with pytest.raises(HloError, match=r"while\.2.*inner_condition"):
        cost(PROGRAM.replace("constant(24)", "parameter(1)"))


def test_other_text_is_no_program():
    with pytest.raises(HloError, match="ENTRY"):
        parse("HloModule nothing\n")


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("f32[250112,1024]{1,0:T(8,128)}", 250_112 * 1024 * 4),
        ("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s32[], pred[7]{0})", 12 + 4 + 7),
        ("s4[10]{0}", 5),
        ("f8e4m3fn[16]{0}", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_arrays(result, size):
    assert array_bytes(result) == size


SCHEDULE = """= control target key start
LB: loop body

     0   :  { %s1 = inlined_call_operand.hbm } /* entry bundle: %ours.3 = custom-call(%x.1) */
   0x1   :  { %v1 = vld }
   0x2 LB: > { %v2 = vld }
   0x3   : > { %v3 = vld }
   0x4 LB: >> { %p4 = scmp.ge.s32.totalorder %s4, 10 /* loop exit test */ ;; %v4 = vld }
   0x5 CT: { %v = target of a jump }
   0x6   : >> { %6 = sbr.rel (!%p4) target = $region1 }
   0x7 LB: >> { %p7 = scmp.ge.s32.totalorder (%p4), %s7, 5 /* loop exit test */ }
   0x8   : >> { %8 = sbr.rel (!%p7) target = $region2 }
   0x9   : > { %p9 = scmp.ge.s32.totalorder %s9, 34 /* loop exit test */ }
   0xa   : > { %10 = sbr.rel (!%p9) target = $region3 ;; %v10 = vld }
   0xb   :  { %v11 = vst } /* exit bundle: %ours.3 = custom-call(%x.1) */
"""


def test_bundles_of_a_schedule(tmp_path):
    assert [bundle.depth for bundle in bundles(SCHEDULE)] == [0, 0, 1, 1, 2, 0, 2, 2, 2, 1, 1, 0]
    want = 3 + (34 - 2) * (4 + 10 * 3 + 5 * 2)  # the grid's loop has two iterations more than the grid
    assert count(bundles(SCHEDULE)) == want
    (tmp_path / "1-ours.3-01-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "1-ours.3-00-schedule-analysis_final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "1-fusion.1-01-final_bundles.txt").write_text(SCHEDULE.replace("ours.3 = custom-call", "fusion.1 = fusion"))
    assert scheduled_cycles(tmp_path) == {"ours.3": want, "fusion.1": want}


def test_a_kernel_without_a_schedule_takes_as_long_as_its_like():
    known = {"ours.3": 7, "ours_backward.1": 9}
    assert [lookup_cycles(name, known) for name in ("ours.3", "ours.4", "ours_backward.2", "other.1", "ours")] == [
        7,
        7,
        9,
        0,
        0,
    ]
