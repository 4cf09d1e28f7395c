"""Noise levels of the few steps, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from memflow import MemFlowPipeline
from memflow.errors import MemFlowError
from memflow.stream.sampler import DistilledSchedule, Noise, to_device
from memflow_bench.untrained import noise_pipeline

SCHEDULER = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)


def test_warped_steps():
    schedule = DistilledSchedule(SCHEDULER, (1000, 750, 500, 250))
    assert schedule.sigmas == pytest.approx([1, 0.9375, 0.8333333, 0.625], abs=1e-6)
    assert schedule.timesteps == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)


def test_clean_undoes_add_noise():
    schedule = DistilledSchedule(SCHEDULER, (1000, 500))
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    noisy = schedule.add_noise(1, clean, noise)
    torch.testing.assert_close(schedule.clean(1, noisy, noise - clean), clean)


@pytest.mark.parametrize("steps", [(), (0,), (1001,), (500, 750), (500, 500)])
def test_refuses_steps(steps):
    with pytest.raises(MemFlowError, match="denoising_steps must fall from at most 1000"):
        DistilledSchedule(SCHEDULER, steps)


def test_a_first_chunk_with_steps_of_its_own():
    """As Causal Forcing++ is run: four steps for the first frame, one for the others."""
    pipe = noise_pipeline()
    pipe.register_to_config(denoising_steps=[1000], first_denoising_steps=[1000, 750, 500])
    stream, seen = pipe.stream(["a red boat"], seconds_per_prompt=2.25, height=32, width=32), []
    denoise = stream.driver.denoise
    stream.driver.denoise = lambda latents, timestep: seen.append(round(timestep, 1)) or denoise(latents, timestep)
    assert len(list(stream)) == 3
    assert seen == [1000.0, 937.5, 833.3, 1000.0, 1000.0]


def test_first_steps_are_part_of_what_a_saved_stream_must_find_again(tmp_path):
    pipe = noise_pipeline()
    stream = pipe.stream(["a red boat"], height=32, width=32)
    stream.save(tmp_path / "state")
    pipe.register_to_config(first_denoising_steps=[1000])
    with pytest.raises(MemFlowError, match="another model, it differs in: first_denoising_steps"):
        pipe.resume(tmp_path / "state")
    pipe.use_preset("causal-forcing-1step-1.3b")
    assert (len(pipe.schedule), len(pipe.first_schedule)) == (1, 4)
    pipe.use_preset("self-forcing-1.3b")
    assert (len(pipe.schedule), len(pipe.first_schedule)) == (4, 4)


def test_wrong_first_steps_are_refused_by_name():
    pipe = noise_pipeline()
    parts = pipe.components | {"first_denoising_steps": [500, 750]}
    with pytest.raises(MemFlowError, match="first_denoising_steps must fall from at most 1000"):
        MemFlowPipeline(**parts)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), UniPCMultistepScheduler()], ids=lambda s: type(s).__name__)
def test_refuses_other_schedulers(scheduler):
    with pytest.raises(MemFlowError, match=f"scheduler must hold .* got {type(scheduler).__name__}"):
        DistilledSchedule(scheduler, (1000, 500))


def test_noise_goes_on_where_its_state_was_taken():
    noise, again = Noise([3, 4]), Noise([5, 6])
    noise((2,))
    state = noise.state()
    expected = to_device(noise((3, 2)), torch.device("cpu"))
    again.set_state(state)
    assert torch.equal(again((3, 2)), expected)
    for wrong in (state[:1], state.to(torch.int16), state[:, 1:]):
        with pytest.raises(ValueError, match="noise must be"):
            again.set_state(wrong)
