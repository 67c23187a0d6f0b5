"""A whole update with all fused ops of a GPU equals that by definition, under Triton's interpreter."""

import pytest
import torch

from hdfast.overrides import apply_overrides
from hdfast.tuning import trials as trying
from hdfast.tuning.choice import Job
from hdfast.tuning.trials import Trials
from hdfast_kernels import dispatch
from tests.agent_cases import SPECS, make_actions, small_config
from tests.interpreter import inside, interpreted, outside


@outside
def test_under_the_interpreter():
    interpreted(__file__, least=2)


@inside
@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_an_update_is_right(continuous):
    """In bfloat16: only there are products of bfloat16, one-hot matrices and blocks of pixels."""
    import interpreter_bf16
    import interpreter_memory

    interpreter_bf16.patch()
    interpreter_memory.patch()
    config = apply_overrides(
        small_config(), {"replay": {"batch": 2, "length": 3}, "behavior": {"horizon": 2}}
    )
    trials = Trials(Job(SPECS, make_actions(continuous), config, torch.device("cpu"), torch.bfloat16))
    trials.measure_definition()
    fused = dispatch.first_of(trying.FUSED["cuda"])
    assert {"adam_step", "image_deconv", "linear", "rssm_observe"} <= fused.keys()
    assert trials.judge(fused).why == ""
