"""Text pipelines on a GPU: the texts and bounds of the CPU for the same draws; half precision, compiled blocks."""

import pytest
import torch
from device import DEVICE, ON_GPU
from texts import tiny_text_pipeline
from tiny import seeded


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("prediction_type", ["sample", "score"])
def test_texts_and_bounds_are_those_of_the_cpu(process, prediction_type):
    found = []
    for device in ("cpu", DEVICE):
        options = {"process": process, "prediction_type": prediction_type}
        pipeline = tiny_text_pipeline(scheduler_options=options, num_classes=3).to(device)
        arguments = {"class_labels": [0, 2], "guidance_scale": 2.0, "num_inference_steps": 12}
        texts = pipeline(prompt="ab[MASK]d", generator=[seeded(0), seeded(1)], **arguments).texts
        found.append((texts, pipeline.log_likelihood(["abcd", "gfe"], generator=seeded(2)).nats))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3)


def test_generators_of_the_device_and_half_precision():
    pipeline = tiny_text_pipeline().to(DEVICE, torch.bfloat16)
    draw = [
        pipeline(batch_size=3, num_inference_steps=12, generator=torch.Generator(DEVICE).manual_seed(0))
        for _ in range(2)
    ]
    assert draw[0].texts == draw[1].texts and draw[0].token_ids.device.type == DEVICE.type


def test_compiled_blocks_say_the_same():
    pipeline = tiny_text_pipeline().to(DEVICE)
    expected = pipeline(batch_size=3, num_inference_steps=12, generator=[seeded(i) for i in range(3)]).texts
    pipeline.transformer.compile_repeated_blocks(dynamic=True, backend="inductor" if ON_GPU else "eager")
    assert pipeline(batch_size=3, num_inference_steps=12, generator=[seeded(i) for i in range(3)]).texts == expected
