"""Apple's GPUs, which have no float64: the real code on a pretended one, against the same on the CPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from apple import APPLE, AppleMode
from networks import small_dit

from score_sde import DiscreteScoreScheduler, NoiseConditionalClassifier, ScoreSDEScheduler
from score_sde.losses import (
    DISCRETE_LOSSES,
    DISCRETE_TIME_DENSITIES,
    TIME_DENSITIES,
    WEIGHTINGS,
    DiscreteObjective,
    Objective,
    hybrid_loss,
    sliced_score_matching,
)
from score_sde.pipelines import adaptive, likelihood
from score_sde.schedulers.discrete_paths import DISCRETE_PATHS, DISCRETE_PREDICTIONS, draw_uniforms, likelihood_bound
from score_sde.schedulers.discrete_solvers import PREDICTORS
from score_sde.schedulers.paths import SDE_TYPES
from score_sde.training import train
from score_sde.training.parts import latents, metrics
from score_sde.training.parts.flops import FlopCounter
from score_sde.training.parts.loop import Draws, Window, fit, make_accelerator
from score_sde.training.parts.run_folder import open_run
from score_sde.training.parts.tasks import Task


def on_both(compute):
    """What f(device) computes on the CPU, and on the pretended GPU."""
    torch.manual_seed(0)
    expected = compute(torch.device("cpu"))
    torch.manual_seed(0)
    with AppleMode():
        found = compute(APPLE)
        found = found.cpu() if isinstance(found, torch.Tensor) else found
    return expected, found


def draws_on(device, batch_size=4):
    return Draws(0, 0, SimpleNamespace(num_processes=1, process_index=0, device=device), batch_size)


def samples(device, *shape, count=1):
    """Standard normal numbers, the same on both devices."""
    found = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    return found if count > 1 else found[0]


def uniform_numbers(count=4):
    return (torch.arange(count, dtype=torch.float64) + 0.3) / count


def test_times_are_drawn_on_the_cpu_and_noise_on_the_device():
    with AppleMode():
        draws = draws_on(APPLE, 400)
        for numbers in (draws.uniform(), draws.stratified()):
            assert (numbers.device.type, numbers.dtype) == ("cpu", torch.float64)
        assert draws.normal((2,)).device == draws.chance(0.3).device == APPLE
        assert 0.15 < draws.chance(0.3).float().mean().item() < 0.45


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x.double(),
        lambda x: x.cpu().double().to(APPLE),
        lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
        lambda x: x + torch.ones(2),
    ],
)
def test_the_pretended_gpu_refuses_what_a_real_one_does(mistake):
    with AppleMode(), pytest.raises((TypeError, RuntimeError), match="float64|same device"):
        mistake(torch.ones(2).to(APPLE))


OBJECTIVES = [("uniform", weighting) for weighting in WEIGHTINGS]
OBJECTIVES += [(density, "output") for density in TIME_DENSITIES] + [("importance", "likelihood")]


@pytest.mark.parametrize(("density", "weighting"), OBJECTIVES)
def test_objectives(density, weighting):
    def step(device):
        model, scheduler = small_dit().to(device), ScoreSDEScheduler()
        objective = Objective(scheduler, density, weighting)
        t, (x0, noise) = objective.times(uniform_numbers()), samples(device, 4, 3, 8, 8, count=2)
        labels = torch.arange(4, device=device)
        objective(model, x0, noise, t, {"class_labels": labels}).mean().backward()
        return model.proj_out.weight.grad

    expected, found = on_both(step)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_variational_bound():
    def step(device):
        model = small_dit(learn_sigma=True).to(device)
        scheduler = ScoreSDEScheduler(sde_type="discrete_vp", num_train_timesteps=4, variance_type="learned_range")
        t, (x0, noise) = Objective(scheduler, "levels").times(uniform_numbers()), samples(device, 4, 3, 8, 8, count=2)
        hybrid_loss(model, scheduler, x0, noise, t, vlb_weight=1.0).mean().backward()
        return model.proj_out.weight.grad

    expected, found = on_both(step)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_sliced_score_matching():
    def step(device):
        scheduler, (x, probes) = ScoreSDEScheduler(prediction_type="score"), samples(device, 4, 3, 8, 8, count=2)
        t = TIME_DENSITIES["uniform"](scheduler, uniform_numbers())
        weight = torch.full((1, 3, 1, 1), -0.5, device=device, requires_grad=True)

        def network(x, timestep):
            return SimpleNamespace(sample=weight * x)

        sliced_score_matching(network, scheduler, x, t, probes).mean().backward()
        return weight.grad

    expected, found = on_both(step)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_classifier_of_noisy_samples():
    def step(device):
        model = NoiseConditionalClassifier(sample_size=8, block_out_channels=(16, 16), dropout=0.0).to(device)
        scheduler, (x0, noise) = ScoreSDEScheduler(), samples(device, 4, 3, 8, 8, count=2)
        t = TIME_DENSITIES["uniform"](scheduler, uniform_numbers())
        x = scheduler.path.sample(x0, noise, t)
        return model(*scheduler.classifier_input(x, t)).logits.detach()

    expected, found = on_both(step)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_the_steps_of_a_scheduler(sde_type):
    def sample(device):
        model, scheduler = small_dit().to(device), ScoreSDEScheduler(sde_type=sde_type, thresholding=True)
        scheduler.set_timesteps(3, device)
        x = samples(device, 4, 3, 8, 8) * scheduler.init_noise_sigma
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                output = model(scheduler.scale_model_input(x, timestep), timestep).sample
                x = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(0)).prev_sample
            return scheduler.add_noise(x, torch.ones_like(x), scheduler.timesteps[-1:])

    expected, found = on_both(sample)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("solve", ["probability_flow", "reverse_sde"])
def test_adaptive_solvers(solve):
    def sample(device):
        scheduler = ScoreSDEScheduler(prediction_type="epsilon")
        denoise = scheduler.denoiser(lambda x, timestep: 0.3 * x)
        options = {"generator": torch.Generator().manual_seed(0)} if solve == "reverse_sde" else {}
        x = samples(device, 4, 1, 2, 2)
        return getattr(adaptive, solve)(scheduler.path, denoise, x, 1.0, 1e-3, 0.2, 0.1, **options)

    expected, found = on_both(sample)
    # rounding may choose other steps
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_likelihoods():
    def bits(device):
        scheduler = ScoreSDEScheduler(prediction_type="epsilon")
        denoise = scheduler.denoiser(lambda x, timestep: 0.3 * x)
        x = samples(device, 4, 1, 2, 2)
        return likelihood.log_likelihood(
            scheduler.path, denoise, x, 1e-3, 1.0, 1.0, 1e-4, 1e-4, trace="exact", steps=3
        ).log_prob

    expected, found = on_both(bits)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_statistics_of_latents_and_metrics():
    def figures(device):
        moments = [(mean, mean.abs()) for mean in samples(device, 4, 2, 4, 4, count=2)]
        features, other = samples(device, 40, 6), samples(device, 50, 6)
        statistics = latents.latent_statistics(iter(moments))
        distance = metrics.frechet_distance(*metrics.moments(features), *metrics.moments(other))
        return torch.tensor(
            [*statistics["std"], distance, *metrics.precision_and_recall(other, features, device=device)]
        )

    expected, found = on_both(figures)
    assert (found - expected).abs().max() < 1e-6


def test_the_window_of_logged_values():
    def mean(device):
        one_process = SimpleNamespace(reduce=lambda x, reduction: x, num_processes=1, device=torch.device(device))
        window = Window()
        window.begin_step({"step": 0, "images_seen": 0})
        window.add({"loss": torch.full((), 3.0, device=device), "part": torch.ones(2, device=device)}, None)
        means, finite = window.read(one_process)
        assert finite == [True]
        return torch.tensor(list(means.values()))

    expected, found = on_both(mean)
    assert found.tolist() == expected.tolist() == [3.0, 1.0]


def test_a_training_loop(tmp_path, monkeypatch):
    """All of `fit`: data, draws, loss, optimizer, averages, log."""
    # it counts on a real "meta"
    monkeypatch.setattr(FlopCounter, "watching", lambda self, model: model)
    monkeypatch.setattr(FlopCounter, "flops", 1, raising=False)
    monkeypatch.setattr(FlopCounter, "__init__", lambda self, model: None)
    config = train.TrainConfig(
        output_dir=str(tmp_path),
        batch_size=4,
        max_train_steps=2,
        logging_steps=1,
        lr_warmup_steps=0,
        checkpointing_steps=0,
        peak_tflops=1.0,
        gradient_accumulation_steps=2,
    )
    rows = [{"images": image, "labels": torch.tensor(i % 5)} for i, image in enumerate(samples("cpu", 16, 3, 8, 8))]

    def trained(device):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        accelerator = make_accelerator(config)
        monkeypatch.setattr(Accelerator, "device", device)
        objective = Objective(ScoreSDEScheduler())

        class Denoising(Task):
            def compute_loss(self, state, batch, draws):
                x0, t = batch["images"], objective.times(uniform_numbers())
                draws.times = t
                losses = objective(state.model, x0, x0.flip(0), t, {"class_labels": batch["labels"]})
                return losses.mean(), train.loss_by_time(losses.detach(), t, objective.scheduler)

        config.on_existing_run = "set_aside"
        with open_run(config, accelerator) as run:
            model, _ = fit(config, accelerator, run, Denoising(small_dit(class_dropout_prob=0.0).to(device), rows))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    expected, found = on_both(trained)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("prediction_type", DISCRETE_PREDICTIONS)
@pytest.mark.parametrize("process", DISCRETE_PATHS)
def test_objectives_and_bounds_of_tokens_without_float64(process, prediction_type):
    scheduler = DiscreteScoreScheduler(5, process, prediction_type=prediction_type)
    path, tokens, logits = scheduler.path, torch.tensor([[0, 3, 2], [4, 4, 1]]), samples(torch.device("cpu"), 2, 3, 5)
    uniforms = draw_uniforms((2, 3), torch.Generator().manual_seed(0))

    def compute(device):
        x0, output, found = tokens.to(device), logits.to(device), []
        for loss, time_density in itertools.product(DISCRETE_LOSSES, DISCRETE_TIME_DENSITIES):
            objective = DiscreteObjective(scheduler, loss, time_density)
            t = objective.times(uniform_numbers(2))
            network = lambda x_t, timestep: SimpleNamespace(sample=output)  # noqa: E731
            found.append(objective(network, x0, t, uniforms.float().to(device)).float())

        def denoise(x_t, t):
            return scheduler.clean_log_probs(output, x_t, t)

        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        # float32 draws are others
        assert path.prior((2, 3), generators[0], device).shape == (2, 3)
        bound = likelihood_bound(path, denoise, x0, torch.full((2,), 0.5).double(), 1e-9, 1.0, generators)
        assert bound.shape == (2,)
        x_t = path.corrupt(x0, 0.5, uniforms=uniforms.float().to(device))
        log_p0 = denoise(x_t, 0.5)
        found += [path.posterior(log_p0, x_t, 0.5, 0.25).float().sum(-1), path.marginal(x0, 0.5).float()[..., 0]]
        return torch.cat([each.flatten() for each in found])

    expected, found = on_both(compute)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("predictor", "process"), [(name, each) for name, row in PREDICTORS.items() for each in row.processes]
)
def test_samplers_of_tokens_without_float64(predictor, process):
    corrector = {"corrector": "gibbs"} if process == "uniform" else {}
    scheduler = DiscreteScoreScheduler(5, process, predictor=predictor, **corrector)
    output = samples(torch.device("cpu"), 2, 3, 5)
    with AppleMode():
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        x = scheduler.init_noise((2, 3), generators, APPLE)
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            x = scheduler.step(output.to(APPLE), t, x, generator=generators).prev_sample
        assert int(x.cpu().max()) < 5
