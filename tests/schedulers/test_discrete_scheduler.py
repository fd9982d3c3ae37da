"""`DiscreteScoreScheduler` as pipelines and training scripts meet it."""

import json
import math
import re
import threading

import pytest
import torch
from diffusers import DDPMScheduler, VQDiffusionScheduler
from enumerable import MarkovSource, agrees, counts

import score_sde
from score_sde import DiscreteScoreScheduler, ScoreSDEScheduler
from score_sde.schedulers.discrete_paths import DISCRETE_PATHS, NOISES
from score_sde.schedulers.discrete_solvers import CORRECTORS, PREDICTORS, SELECTIONS, SPACINGS


EVERY = [(name, process) for name, row in PREDICTORS.items() for process in row.processes]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def logits(*shape, seed=0):
    return 2 * torch.randn(shape, generator=seeded(seed))


def trajectory(scheduler, generator, shape=(2, 6), num_steps=3, **step):
    x = scheduler.init_noise(shape, seeded(9))
    scheduler.set_timesteps(num_steps)
    for index, t in enumerate(scheduler.timesteps):
        output = logits(*shape, scheduler.config.vocab_size, seed=index)
        x = scheduler.step(output, t, x, generator=generator, **step).prev_sample
    return x


@pytest.mark.parametrize(("name", "process"), EVERY)
def test_every_predictor_ends_at_tokens_and_repeats_itself(name, process):
    scheduler = DiscreteScoreScheduler(5, process, predictor=name)
    first, again = (trajectory(scheduler, seeded(1)) for _ in range(2))
    assert first.dtype == torch.int64 and int(first.max()) < 5
    assert torch.equal(first, again) and not torch.equal(first, trajectory(scheduler, seeded(2)))
    # a sequence depends on its generator, not on the batch around it
    alone = [trajectory(scheduler, [seeded(7), seeded(seed)])[1] for seed in (3, 4)]
    together = trajectory(scheduler, [seeded(3), seeded(4)])
    assert torch.equal(together[1], alone[1]) and not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize(("name", "process"), EVERY)
def test_no_noise_is_left_where_alpha_begins_below_one(name, process):
    scheduler = DiscreteScoreScheduler(5, process, noise=lambda t: 0.99 * (1 - t), predictor=name)
    x = scheduler.init_noise((2, 1000), seeded(0))
    scheduler.set_timesteps(10)
    output = torch.full((2, 1000, 5), -100.0)
    output[..., 3] = 0
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, generator=seeded(1)).prev_sample
    assert (x == 3).all()


def test_another_corrector_takes_its_own_steps():
    scheduler = DiscreteScoreScheduler(vocab_size=5, process="uniform")
    corrected = DiscreteScoreScheduler.from_config(scheduler.config, corrector="gibbs")
    assert (scheduler.config.corrector_steps, corrected.config.corrector_steps) == (0, 1)
    more = DiscreteScoreScheduler.from_config(corrected.config, corrector_steps=3)
    same = DiscreteScoreScheduler.from_config(more.config, corrector="gibbs")
    without = DiscreteScoreScheduler.from_config(more.config, corrector=None)
    assert [each.config.corrector_steps for each in (more, same, without)] == [3, 3, 0]


@pytest.mark.parametrize(
    ("saved", "given", "left"),
    [
        (
            {"predictor": "entropy_bounded", "entropy_bound": 0.2},
            {"predictor": "first_hitting"},
            {"entropy_bound": None},
        ),
        ({"predictor": "margin", "threshold": 0.9}, {"predictor": "tweedie"}, {"threshold": None}),
        ({"predictor": "margin", "threshold": 0.9}, {"predictor": "confidence"}, {"threshold": 0.9}),
        (
            {"predictor": "ancestral", "corrector": "remasking", "remasking_eta": 0.2},
            {"predictor": "first_hitting"},
            {"corrector": None, "remasking_eta": None},
        ),
        (
            {"predictor": "ancestral", "corrector": "remasking", "remasking_eta": 0.2},
            {"corrector": None},
            {"corrector": None, "remasking_eta": None},
        ),
        (
            {"process": "uniform", "corrector": "gibbs", "corrector_k": 3, "corrector_selection": "lowest_maxprob"},
            {"corrector": None},
            {"corrector_k": 1, "corrector_selection": "random", "corrector_steps": 0},
        ),
        (
            {"process": "uniform", "corrector": "gibbs", "corrector_k": 3},
            {"predictor": "ancestral"},
            {"corrector": "gibbs", "corrector_k": 3, "corrector_steps": 1},
        ),
        ({"alpha_min": 0.005}, {"noise": "geometric"}, {"alpha_min": None}),
        ({"alpha_min": 0.005}, {"noise": "cosine"}, {"alpha_min": 0.005}),
    ],
)
def test_what_is_of_another_choice_is_left_behind(saved, given, left):
    scheduler = DiscreteScoreScheduler(5, **saved)
    other = DiscreteScoreScheduler.from_config(scheduler.config, **given)
    assert {name: other.config[name] for name in given | left} == given | left
    # and stays so when it is saved and opened
    again = DiscreteScoreScheduler.from_config(dict(other.config))
    assert {name: again.config[name] for name in given | left} == given | left


def test_what_is_given_for_another_choice_is_refused():
    config = DiscreteScoreScheduler(5, predictor="entropy_bounded", entropy_bound=0.2).config
    with pytest.raises(ValueError, match="entropy_bound 0.3 is for entropy_bounded, not for 'margin'"):
        DiscreteScoreScheduler.from_config(config, predictor="margin", entropy_bound=0.3)
    config = DiscreteScoreScheduler(5, predictor="ancestral", corrector="remasking", remasking_eta=0.2).config
    for given in ({"corrector": "remasking"}, {"remasking_eta": 0.3}):
        with pytest.raises(ValueError, match="remasking.* is for .*, not for"):
            DiscreteScoreScheduler.from_config(config, predictor="margin", **given)
    with pytest.raises(ValueError, match="noise 'geometric' has no option alpha_min"):
        DiscreteScoreScheduler.from_config(DiscreteScoreScheduler(5).config, noise="geometric", alpha_min=0.005)


@pytest.mark.parametrize(("name", "process"), EVERY)
def test_what_is_not_free_stays(name, process):
    scheduler = DiscreteScoreScheduler(5, process, predictor=name)
    free = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    x = scheduler.init_noise((2, 6), seeded(0))
    x[:, [1, 4]] = torch.tensor([[2, 3], [4, 0]])
    given = x.clone()
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        out = scheduler.step(logits(2, 6, 5), t, x, generator=seeded(1), free_mask=free)
        x = out.prev_sample
        assert not bool(out.changed[1]) and torch.equal(out.pred_original_sample[:, [1, 4]], given[:, [1, 4]])
    assert torch.equal(x[~free], given[~free]) and int(x[free].max()) < 5
    scheduler.set_timesteps(1)
    for wrong in (free.float(), free[:, :3]):
        with pytest.raises(ValueError, match=re.escape("free_mask must be bool of shape (2, 6) or (6,)")):
            scheduler.step(logits(2, 6, 5), 1000.0, x, free_mask=wrong)


def test_infilling_draws_from_the_conditional():
    source = MarkovSource(vocab_size=3, length=4)
    scheduler = DiscreteScoreScheduler(3, predictor="first_hitting")
    network, free = source.network(scheduler), torch.tensor([True, False, True, True])
    x = torch.full((20000, 4), 3)
    x[:, 1] = 2
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, generator=seeded(int(t)), free_mask=free).prev_sample
    kept = source.sequences[:, 1] == 2
    expected = torch.where(kept, source.probabilities, 0.0) / source.probabilities[kept].sum()
    assert agrees(counts(x, 3), expected) > 1e-3


@pytest.mark.parametrize("block", [1, 2])
def test_block_after_block_is_exact(block):
    source = MarkovSource(vocab_size=3, length=4)
    scheduler = DiscreteScoreScheduler(3, predictor="margin")
    network, generator, x = source.network(scheduler), seeded(0), torch.full((20000, 4), 3)
    for start in range(0, 4, block):
        free = torch.zeros(4, dtype=torch.bool)
        free[start : start + block] = True
        scheduler.set_timesteps(block)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, generator=generator, free_mask=free).prev_sample
    assert agrees(counts(x, 3), source.probabilities) > 1e-3


def test_it_says_what_changed():
    scheduler = DiscreteScoreScheduler(5, predictor="first_hitting")
    scheduler.set_timesteps(10)
    x, said = scheduler.init_noise((2, 4)), []
    for t in scheduler.timesteps:
        out = scheduler.step(logits(2, 4, 5), t, x, generator=seeded(0))
        assert torch.equal(out.transfer_index, out.prev_sample != x)
        assert torch.equal(out.changed, out.transfer_index.any(1))
        said.append(bool(out.changed.any()))
        x = out.prev_sample
    # one position after the other, then none: evaluations that a network without time need not make
    assert said == [True] * 4 + [False] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("name", "process"), EVERY)
def test_networks_of_any_dtype(name, process, dtype):
    scheduler = DiscreteScoreScheduler(5, process, predictor=name)
    x = scheduler.init_noise((3, 4), seeded(0))
    output = logits(3, 4, 5).to(dtype)
    found = []
    for each in (output, output.double()):
        scheduler.set_timesteps(2)
        found.append(scheduler.step(each, 1000.0, x, generator=seeded(0)).prev_sample)
    assert torch.equal(*found)


def test_filters_of_a_step():
    scheduler = DiscreteScoreScheduler(5, predictor="ancestral")
    output = logits(1, 1, 5).expand(3000, 1, 5)
    masks = scheduler.init_noise((3000, 1))

    def drawn(**options):
        scheduler.set_timesteps(1)
        return scheduler.step(output, 1000.0, masks, generator=seeded(0), **options).prev_sample.unique().tolist()

    order = output[0, 0].argsort(descending=True).tolist()
    assert drawn(temperature=0) == [order[0]] == drawn(sampling_method="greedy")
    assert drawn(top_k=2) == sorted(order[:2])
    assert drawn(top_p=float(output[0, 0].softmax(-1)[order[:2]].sum()) - 1e-3) == sorted(order[:2])
    assert len(drawn(temperature=3.0)) == 5
    for wrong, message in [
        ({"temperature": -1}, "temperature -1"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0}, "top_p 0"),
    ]:
        with pytest.raises(ValueError, match=f"{message} must be a"):
            drawn(**wrong)


def test_the_temperature_of_the_config_falls():
    scheduler = DiscreteScoreScheduler(5, predictor="ancestral", temperature=1.0, final_temperature=0.0)
    scheduler.set_timesteps(4)
    output = logits(1, 3, 5)
    temperatures = []
    x = scheduler.init_noise((1, 3))
    for t in scheduler.timesteps:
        out = scheduler.step(output, t, x, generator=seeded(0))
        x = out.prev_sample
        temperatures.append(float((output / out.pred_logits).mean()))
    assert temperatures == pytest.approx([1.0, 0.75, 0.5, 0.25])


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", DISCRETE_PATHS)
@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_that_of_the_path_at_its_timesteps(process, noise):
    scheduler = DiscreteScoreScheduler(3, process, noise)
    assert scheduler.timestep(torch.tensor(0.25)) == 250 and scheduler.timestep(0.25).dtype == torch.float32
    assert torch.equal(scheduler.path_time(torch.tensor([250.0])), torch.tensor([0.25], dtype=torch.float64))
    tokens = torch.ones(20000, 1, dtype=torch.int64)
    noised = scheduler.add_noise(tokens, torch.full((20000,), 600.0), generator=seeded(0))
    assert agrees(counts(noised, scheduler.path.num_states), scheduler.path.marginal(tokens[:1], 0.6)[0, 0]) > 1e-3
    assert scheduler.mask_token_id == (3 if process == "absorbing" else None)


def test_noise_options_reach_the_path_and_the_file(tmp_path):
    scheduler = DiscreteScoreScheduler(3, noise="polynomial", exponent=3.0, alpha_min=0.0, predictor="margin")
    assert float(scheduler.path.alpha(0.5)) == pytest.approx(1 - 0.5**3)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["exponent"] == 3.0
    opened = DiscreteScoreScheduler.from_pretrained(tmp_path)
    assert {**opened.config} == {name: scheduler.config[name] for name in opened.config}
    other = DiscreteScoreScheduler.from_config(opened.config, predictor="ancestral")
    assert other.config.predictor == "ancestral" and other.config.exponent == 3.0
    assert score_sde.DiscreteScoreScheduler is DiscreteScoreScheduler


def test_noise_may_be_a_function_but_is_not_saved(tmp_path):
    scheduler = DiscreteScoreScheduler(3, noise=lambda t: 1 - t)
    assert float(scheduler.path.alpha(0.25)) == 0.75 and int(trajectory(scheduler, seeded(0)).max()) < 3
    with pytest.raises(ValueError, match="is a function, which no config file holds"):
        scheduler.save_pretrained(tmp_path)


def test_threads_share_nothing():
    expected = {seed: trajectory(DiscreteScoreScheduler(5), seeded(seed)) for seed in range(4)}
    found = {}

    def work(seed):
        found[seed] = trajectory(DiscreteScoreScheduler(5), seeded(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": "masked"}, "process 'masked' is unknown; choose one of absorbing, uniform"),
        ({"noise": "loglinear"}, "noise 'loglinear' is unknown; choose one of log_linear"),
        ({"predictor": "euler"}, "predictor 'euler' is unknown; choose one of auto, ancestral"),
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon' is unknown; choose one of sample"),
        ({"corrector": "langevin"}, "corrector 'langevin' is unknown"),
        ({"corrector": "gibbs"}, "corrector 'gibbs' is for process 'uniform'"),
        ({"process": "uniform", "predictor": "first_hitting"}, "predictor 'first_hitting' is for process 'absorbing'"),
        ({"corrector": "remasking"}, "corrector 'remasking' is for process 'absorbing' and predictor 'ancestral'"),
        ({"corrector_steps": 2}, "corrector_steps 2 does not go with corrector None"),
        ({"threshold": 0.5, "predictor": "ancestral"}, "threshold 0.5 is for first_hitting, dilated, confidence"),
        ({"entropy_bound": 0.5, "predictor": "margin"}, "entropy_bound 0.5 is for entropy_bounded, not for 'margin'"),
        ({"remasking_eta": 0.5}, "remasking_eta 0.5 is for remasking, not for None"),
        ({"corrector_k": 2}, "corrector_k 2 is for gibbs, not for None: leave it out"),
        ({"corrector_selection": "lowest_maxprob"}, "corrector_selection lowest_maxprob is for gibbs, not for None"),
        (
            {"corrector_selection_tau": 0.5, "predictor": "ancestral", "corrector": "remasking"},
            "corrector_selection_tau 0.5 is for gibbs, not for 'remasking'",
        ),
        ({"exponent": 2.0}, "noise 'log_linear' has no option exponent"),
        ({"temperature": -1.0}, "temperature -1.0 must be a number from 0"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras' is unknown"),
        ({"vocab_size": 1}, "vocab_size 1 must be a whole number from 2"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DiscreteScoreScheduler(**{"vocab_size": 5} | options)


def test_wrong_steps_are_refused():
    scheduler = DiscreteScoreScheduler(5, predictor="ancestral")
    x = scheduler.init_noise((2, 3))
    with pytest.raises(ValueError, match="call scheduler.set_timesteps"):
        scheduler.step(logits(2, 3, 5), 1000.0, x)
    with pytest.raises(ValueError, match="num_inference_steps 0 must be a whole number from 1"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep 3 is none of this trajectory's"):
        scheduler.step(logits(2, 3, 5), 3, x)
    with pytest.raises(ValueError, match=re.escape("need (2, 3, 5): the network must be one of tokens")):
        scheduler.step(logits(2, 3, 4, 4), 1000.0, x)
    with pytest.raises(ValueError, match="token ids must be from 0 to 5"):
        scheduler.step(logits(2, 3, 5), 1000.0, x + 1)
    with pytest.raises(ValueError, match="2 generators do not fit a batch of 3|1 generators do not fit a batch of 2"):
        scheduler.step(logits(2, 3, 5), 1000.0, x, generator=[seeded(0)])
    with pytest.raises(ValueError, match="threshold 0.5 is for predictors that order positions"):
        scheduler.step(logits(2, 3, 5), 1000.0, x, threshold=0.5)
    with pytest.raises(ValueError, match="token ids must be from 0 to 4"):
        scheduler.add_noise(x, 500.0)
    with pytest.raises(ValueError, match="must lie between 0"):
        scheduler.add_noise(x - 1, 1001.0)
    for t in scheduler.timesteps:
        x = scheduler.step(logits(2, 3, 5), t, x, return_dict=False)[0]
    with pytest.raises(ValueError, match="all 2 entries of the plan have run"):
        scheduler.step(logits(2, 3, 5), t, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("process", "predictor"), [(row, name) for name in PREDICTORS for row in PREDICTORS[name].processes]
)
def test_outputs_that_are_not_finite_are_refused_instead_of_drawn_by(process, predictor, value):
    scheduler = DiscreteScoreScheduler(5, process, predictor=predictor)
    scheduler.set_timesteps(3)
    x, output = scheduler.init_noise((2, 3), seeded(0)), logits(2, 3, 5)
    x = scheduler.step(output, scheduler.timesteps[0], x, generator=seeded(1)).prev_sample
    place = int((x[1] == scheduler.mask_token_id).nonzero()[0]) if process == "absorbing" else 0
    output[1, place, 2] = value
    with pytest.raises(ValueError, match="model_output is not finite .nan, infinite. at timestep 6"):
        scheduler.step(output, scheduler.timesteps[1], x, generator=seeded(2))
    # a token that a network rules out is none of these
    output[1, place, 2] = -math.inf
    scheduler.step(output, scheduler.timesteps[1], x, generator=seeded(2))


def test_outputs_of_a_corrector_that_are_not_finite_are_refused():
    scheduler = DiscreteScoreScheduler(5, "uniform", corrector="gibbs", timestep_type="index")
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="model_output is not finite"):
        scheduler.step_correct(logits(2, 3, 5) * math.nan, 0, scheduler.init_noise((2, 3), seeded(0)))


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_a_likelihood_of_outputs_that_are_not_finite_is_refused(process):
    scheduler, tokens = DiscreteScoreScheduler(5, process), torch.zeros(2, 3, dtype=torch.long)
    u = torch.tensor([0.2, 0.7], dtype=torch.float64)

    def bound(value, row):
        def network(x_t, timesteps):
            output = logits(2, 3, 5)
            output[row, 1, 2] = value
            return output

        return scheduler.likelihood_bound(network, tokens, u, seeded(0))

    with pytest.raises(ValueError, match="model_output is not finite .nan, infinite. at timestep [0-9]"):
        bound(math.nan, 1)
    # a token that a network rules out, and that isn't there
    assert bound(-math.inf, 1).isfinite().all()


def test_continuous_and_discrete_configs_are_not_mistaken_for_each_other():
    for other in (ScoreSDEScheduler(), DDPMScheduler(), VQDiffusionScheduler(num_vec_classes=5)):
        with pytest.raises(ValueError, match="continuous|no process over tokens is known|VQDiffusionScheduler has no"):
            DiscreteScoreScheduler.from_config(other.config, vocab_size=5)
    with pytest.raises(ValueError, match="its samples are tokens"):
        ScoreSDEScheduler.from_config(DiscreteScoreScheduler(5).config)
    with pytest.raises(ValueError, match="'predicter' is no argument of DiscreteScoreScheduler; the nearest"):
        DiscreteScoreScheduler.from_config(DiscreteScoreScheduler(5).config, predicter="margin")


# --- what is written of it --------------------------------------------------------------------------------------------


ARGUMENTS = {
    "process": DISCRETE_PATHS,
    "noise": NOISES,
    "corrector": CORRECTORS,
    "corrector_selection": SELECTIONS,
    "timestep_spacing": SPACINGS,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_docstring_names_every_choice(name):
    text = re.search(rf"^ +{name}: (.*?)(?=^ +[\w, ]+: )", DiscreteScoreScheduler.__doc__, re.MULTILINE | re.DOTALL)[1]
    assert [choice for choice in ARGUMENTS[name] if choice not in re.findall(r"\w+", text)] == []


def test_its_table_names_every_predictor_and_its_processes():
    rows = re.findall(r"^    \| (\w+) \|.*\| (\w+) \|.*\|$", DiscreteScoreScheduler.__doc__, re.MULTILINE)
    found = {name: process for name, process in rows if name not in ("predictor", "auto")}
    both = {name: "both" if len(row.processes) == 2 else row.processes[0] for name, row in PREDICTORS.items()}
    assert found == both
