"""Samples whose tokens are at noise levels of their own, as video models have them whose first frames are given (LTX):
one step of each token, for `ScoreSDEScheduler.step(per_token_timesteps=)`."""

import torch


def step_tokens(stage, memory, output, x, own, times, limit, draw_noise):
    """(the tokens after this stage, their denoised ones) on the straight path; (B, L, C) each.

    A token at the stage's own time takes the stage. One with less noise, which waits for the others, takes an Euler
    step to the first lower of the plan's times; what the memory keeps of it is where it would be at the stage's time.

    Args:
        output: x0 - noise as the network estimates it, the negative velocity, as those pipelines pass it.
        own: times of the tokens, (B, L) or (B, 1).
        times: of the plan, falling to 0, on the device of x.
        limit: f(denoised) -> denoised, which clips or thresholds where configured.
    """
    own = own.to(x.device, x.dtype).unsqueeze(-1)  # (B, L, 1)
    x0 = x + own * output
    denoised = limit(x0)
    after = stage.update(x0 - stage.t_eval * output, denoised, memory, draw_noise)
    times = times.to(x.dtype)
    below = torch.where(times < own - 1e-6, times, 0.0).amax(-1, keepdim=True)
    waits = own < stage.t_eval - 1e-6
    return torch.where(waits, denoised - below * output, after), denoised
