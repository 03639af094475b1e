"""What the text of a compiled program tells, on one written by hand."""

from experiments.program_text import (
    Array,
    arrays_made,
    arrays_named,
    largest,
    talk_between_devices,
)

PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%fused_computation (param_0: f32[8,4]) -> bf16[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %wide.1 = f32[8,8]{1,0} broadcast(%param_0), dimensions={0,1}
  ROOT %convert.1 = bf16[8,4]{1,0} convert(%param_0)
}

ENTRY %main.2 (x: f32[8,4]) -> (f32[8,4], /*index=1*/s8[3]) {
  %x = f32[8,4]{1,0} parameter(0), metadata={op_name="state.opt_state[1].mu[\\'wte\\']"}
  %fusion.1 = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation
  %again = bf16[8,4]{1,0} copy(%fusion.1)
  %call = (f32[8,4]{1,0}, s8[3]{0}) custom-call(%again), custom_call_target="gemm"
  %part = f32[8,4]{1,0} get-tuple-element(%call), index=0
  ROOT %out = (f32[8,4]{1,0}, /*index=1*/s8[3]{0}) tuple(%part, %x)
}
"""


def test_bytes_of_an_array():
    found = {
        Array("f32", (8, 4)): 128,
        Array("bf16", (8, 4)): 64,
        Array("pred", (8, 4)): 32,
        Array("s4", (8, 4)): 16,
        Array("f8e4m3fn", (8, 4)): 32,
        Array("c64", (8, 4)): 256,
    }
    assert {array: array.bytes for array in found} == found
    assert str(Array("f8e4m3fn", (8, 4))) == "f8e4m3fn[8,4]"


def test_arrays_inside_a_fusion_are_named_but_not_made():
    assert Array("f32", (8, 8)) in arrays_named(PROGRAM)
    assert arrays_made(PROGRAM) == {
        Array("bf16", (8, 4)): 2,
        Array("f32", (8, 4)): 1,
        Array("s8", (3,)): 1,
    }
    assert largest(arrays_made(PROGRAM))[0] == (Array("f32", (8, 4)), 1)


TALK = """
  %sum = f32[8,4]{1,0} all-reduce(%part), to_apply=%add
  %first = (bf16[8,1]{1,0}, bf16[8,4]{1,0}) all-gather-start(%again)
  %all = bf16[8,4]{1,0} all-gather-done(%first)
"""


def test_what_starts_and_ends_apart_is_one_operation():
    assert talk_between_devices(PROGRAM) == {}
    assert talk_between_devices(PROGRAM + TALK) == {"all-reduce": (1, 128), "all-gather": (1, 64)}
