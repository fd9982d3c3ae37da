"""Within a trajectory of tokens nothing is sent to the device, and a step waits for it once, to learn which texts have
changed: on a pretended one, which also refuses tensors of two devices."""

import pytest
import torch
from pretended_cuda import CUDA, PretendedCuda, generator
from texts import letters, tiny_text_pipeline


@pytest.fixture
def cuda():
    with PretendedCuda() as cuda:
        yield cuda


TOLD = {
    "nothing": ({"predictor": "first_hitting"}, {}, {}),
    "the time": ({"predictor": "tau_leaping"}, {"time_conditioning": True}, {}),
    "classes": ({"predictor": "ancestral"}, {"num_classes": 3}, {"class_labels": [0, 2], "guidance_scale": 3.0}),
    "uniform noise": ({"process": "uniform", "corrector": "gibbs"}, {"time_conditioning": True}, {}),
    "limits": ({"predictor": "confidence"}, {}, {"temperature": 0.8, "top_k": 3, "top_p": 0.9}),
}


@pytest.mark.parametrize("told", TOLD)
def test_a_step_waits_once_for_what_changed(cuda, told):
    scheduler_options, network_options, arguments = TOLD[told]
    tokenizer = letters("abcdefg", eos_token="<end>", pad_token="<end>")
    pipeline = tiny_text_pipeline(tokenizer, scheduler_options, **network_options).to(CUDA)
    marks = []

    def note(pipeline, step, timestep, tensors):
        assert tensors["token_ids"].is_cuda
        marks.append((len(work.transfers), len(work.waits)))

    arguments = {"batch_size": 2, "prompt": "ab[MASK]d", "num_inference_steps": 8} | arguments
    with cuda.watched() as work:
        found = pipeline(callback_on_step_end=note, generator=generator(), **arguments)
    assert found.token_ids.is_cuda and all(text.startswith("ab") for text in found.texts)
    (begin_transfers, begin_waits), (transfers, waits) = marks[1], marks[-1]
    assert len(marks) >= 6 and work.transfers[begin_transfers:transfers] == []
    # once more where none has changed, to learn whether any can
    steps, unchanged = len(marks) - 2, len(marks) - found.nfe
    assert steps <= waits - begin_waits <= steps + unchanged, work.waits[begin_waits:waits]


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_bounds_are_those_of_the_cpu(cuda, process):
    on_cpu, on_cuda = (tiny_text_pipeline(scheduler_options={"process": process}, num_classes=2) for _ in range(2))
    arguments = {"texts": ["abcd", "abcdefgabcdefg"], "class_labels": [0, 1], "num_samples": 4}
    expected = on_cpu.log_likelihood(**arguments, generator=torch.Generator().manual_seed(0))
    found = on_cuda.to(CUDA).log_likelihood(**arguments, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.nats, expected.nats, rtol=1e-4)


def test_blocks_are_those_of_the_cpu(cuda):
    on_cpu, on_cuda = (tiny_text_pipeline() for _ in range(2))
    arguments = {"prompt": ["abc", "b[MASK]"], "length": 30, "block_length": 6, "num_inference_steps": 6}
    expected, found = (
        each(**arguments, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
        for each in (on_cpu, on_cuda.to(CUDA))
    )
    assert found.texts == expected.texts and found.nfe_of_each.tolist() == expected.nfe_of_each.tolist()
