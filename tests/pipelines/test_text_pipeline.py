"""ScoreSDETextPipeline: exact networks give exact distributions and bounds; prompts, blocks, evaluations, callbacks."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from enumerable import MarkovSource, agrees, all_sequences, counts
from networks import tiny_dit
from peft import LoraConfig, get_peft_model_state_dict
from texts import exact_pipeline, letters, tiny_text_pipeline

from score_sde import DiscreteScoreScheduler, ScoreSDEPipeline, ScoreSDEScheduler, ScoreSDETextPipeline
from score_sde.pipelines.pipeline_score_sde_text import show_text
from score_sde.pipelines.texts import HIDDEN


END = {"eos_token": "<end>", "pad_token": "<end>"}


def seed(number=0):
    return torch.Generator().manual_seed(number)


def seeds(*numbers):
    return [seed(number) for number in numbers]


# --- exact networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "prediction_type", "predictor", "steps"),
    [
        ("absorbing", "sample", "first_hitting", 8),
        ("absorbing", "sample", "ancestral", 100),
        ("absorbing", "score", "tweedie", 100),
        ("uniform", "sample", "ancestral", 100),
    ],
)
def test_samples_have_the_distribution_of_the_source(process, prediction_type, predictor, steps):
    options = {"process": process, "prediction_type": prediction_type, "predictor": predictor}
    pipeline, source = exact_pipeline(**options), MarkovSource()
    output = pipeline(batch_size=2000, num_inference_steps=steps, generator=seed())
    assert agrees(counts(output.token_ids, 3), source.probabilities) > 1e-4
    assert output.texts[0] == "".join("abc"[number] for number in output.token_ids[0])


@pytest.mark.parametrize("prompt", ["b", "[MASK]b[MASK]c", "[MASK][MASK]ca", "ca[MASK]b"])
def test_what_is_filled_in_has_the_exact_distribution_given_the_rest(prompt):
    source, pipeline = MarkovSource(), exact_pipeline(predictor="first_hitting")
    output = pipeline(batch_size=4000, prompt=prompt, num_inference_steps=8, generator=seed(1))
    known = prompt.replace("[MASK]", "?").ljust(4, "?")
    fits = torch.tensor(
        [all(a in ("?", "abc"[b]) for a, b in zip(known, row, strict=True)) for row in source.sequences]
    )
    conditional = torch.where(fits, source.probabilities, 0.0)
    assert agrees(counts(output.token_ids, 3), conditional / conditional.sum()) > 1e-4


def test_blocks_of_the_exact_network_are_exact():
    pipeline = exact_pipeline(predictor="first_hitting")
    output = pipeline(batch_size=4000, block_length=2, num_inference_steps=8, generator=seed(2))
    assert agrees(counts(output.token_ids, 3), MarkovSource().probabilities) > 1e-4


@pytest.mark.parametrize("options", [{}, {"prediction_type": "score"}, {"process": "uniform"}, {"noise": "cosine"}])
def test_the_bound_of_the_exact_network_is_the_entropy(options):
    source, pipeline = MarkovSource(), exact_pipeline(**options)
    # single tokens at small times weigh much in the bound of uniform noise
    samples = 300 if options == {"process": "uniform"} else 64
    found = pipeline.log_likelihood(token_ids=source.sequences, num_samples=samples, generator=seed(), batch_size=10000)
    bound, error = (source.probabilities * found.nats).sum(), (source.probabilities * found.error).norm()
    # the bound is exact on average over the data
    assert abs(bound - source.entropy) < 4 * error and error < 0.04 * source.entropy
    assert found.nfe == math.ceil(81 * samples / 10000)


def test_bits_are_nats_by_tokens_and_characters():
    pipeline = exact_pipeline()
    texts = ["abca", "cc" + "ab", "bbbb"]
    found = pipeline.log_likelihood(texts, num_samples=4, generator=seed())
    assert found.tokens.tolist() == found.characters.tolist() == [4, 4, 4]
    assert found.bits_per_token() == pytest.approx(float(found.nats.sum()) / 12 / math.log(2))
    assert found.bits_per_character_error() == pytest.approx(float(found.error.norm()) / 12 / math.log(2))
    # of the same draws whatever the batch
    again = pipeline.log_likelihood(texts, num_samples=4, generator=seed(), batch_size=5)
    assert torch.allclose(again.nats, found.nats, rtol=1e-6)
    assert pipeline.log_likelihood("abca", num_samples=1).error.isnan().all()


def test_the_standard_error_is_that_of_repetition():
    pipeline, texts = exact_pipeline(), ["abca", "bbac"]
    found = [pipeline.log_likelihood(texts, num_samples=16, generator=seed(number)) for number in range(60)]
    spread = torch.tensor([each.bits_per_token() for each in found]).std()
    stated = torch.tensor([each.bits_per_token_error() for each in found]).square().mean().sqrt()
    # neighbouring times differ a little, so that it is no smaller
    assert 0.8 * spread < stated < 1.6 * spread


def test_a_longer_text_is_the_sum_of_its_windows():
    source, pipeline = MarkovSource(), exact_pipeline()
    # "abca", then "cab" as the end of "acab", of which a is given
    both = pipeline.log_likelihood("abcacab", num_samples=4000, generator=seed(), batch_size=4000)
    assert both.tokens.tolist() == [7]
    exact = []
    for text, given in (("abca", 0), ("acab", 1)):
        ids = torch.tensor(["abc".index(letter) for letter in text])
        alike = (source.sequences[:, :given] == ids[:given]).all(1)
        same = (source.sequences == ids).all(1)
        exact.append(float(source.probabilities[same].sum() / source.probabilities[alike].sum()))
    lower = -sum(map(math.log, exact))
    # a bound for each text, and of a model of masks close to its own
    assert lower - 4 * float(both.error) < float(both.nats) < 1.5 * lower


# --- prompts and ends -------------------------------------------------------------------------------------------------


def test_prompts_stay_and_are_continued():
    pipeline = tiny_text_pipeline()
    output = pipeline(prompt=["abc", "g[MASK]fe[MASK][MASK]d"], num_inference_steps=16, generator=seed())
    first, second = output.texts
    assert first.startswith("abc") and len(first) == 12
    assert (second[0], second[2:4], second[6]) == ("g", "fe", "d") and len(second) == 12
    output = pipeline(prompt="a_b", gap="_", length=3, num_inference_steps=4, generator=seed())
    assert output.texts[0][0] + output.texts[0][2] == "ab" and output.token_ids.shape == (1, 3)


def test_a_complete_prompt_ends_where_it_ends():
    pipeline = tiny_text_pipeline(letters("abcdefg", **END))
    output = pipeline(batch_size=3, prompt="ab[MASK]c", complete=True, num_inference_steps=4, generator=seed())
    assert (output.token_ids[:, 4:] == 7).all() and output.token_ids[:, :2].tolist() == [[0, 1]] * 3
    assert all(text.startswith("ab") and text.endswith("c") for text in output.texts)


def test_gaps_before_a_stated_end_are_filled_in_every_block():
    pipeline = tiny_text_pipeline(letters("abcdefg", **END))
    arguments = {"length": 40, "block_length": 5, "complete": True, "num_inference_steps": 5}
    output = pipeline(prompt=25 * "a" + "[MASK]" + "b", generator=seed(), **arguments)
    assert (output.token_ids[0, 27:] == 7).all() and HIDDEN not in output.texts[0]
    # a text that ends early leaves the others in its batch as they are
    both = pipeline(prompt=["a[MASK]", 25 * "a" + "[MASK]" + "b"], generator=seeds(1, 2), **arguments)
    alone = pipeline(prompt=25 * "a" + "[MASK]" + "b", generator=seeds(2), **arguments)
    assert both.texts[1] == alone.texts[0]


def test_decoding_stops_at_the_first_end_mark_behind_the_prompt():
    pipeline = tiny_text_pipeline(letters("abcdefg", **END))
    output = pipeline(batch_size=20, num_inference_steps=12, generator=seed())
    for ids, text in zip(output.token_ids.tolist(), output.texts, strict=True):
        until = ids.index(7) if 7 in ids else 12
        assert text == "".join("abcdefg"[number] for number in ids[:until])
        assert ids[until:] == [7] * (12 - until)
    assert any(len(text) < 12 for text in output.texts)
    # none before what the prompt states
    output = pipeline(batch_size=20, prompt="a" + 6 * "[MASK]" + "b", num_inference_steps=12, generator=seed())
    assert (output.token_ids[:, 7] == 1).all() and (output.token_ids[:, 1:7] == 7).any()


# --- blocks -----------------------------------------------------------------------------------------------------------


def record(pipeline):
    """A list to which the tokens come that the network sees."""
    seen: list[torch.Tensor] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    return seen


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_blocks_go_on_beyond_the_trained_length(process):
    pipeline = tiny_text_pipeline(scheduler_options={"process": process})
    seen = record(pipeline)
    output = pipeline(prompt="abcdefga", length=30, block_length=5, num_inference_steps=6, generator=seed())
    assert output.texts[0].startswith("abcdefga") and len(output.texts[0]) == 30
    ids = output.token_ids[0]
    ends = [10, 15, 20, 25, 30]  # the first block is the prompt's alone
    assert len({tuple(each.shape) for each in seen}) == (1 if process == "absorbing" else 2)
    for end in ends:
        # before the block it sees the text, behind it masks: never what comes later
        first = max(0, end - 12)
        matching = [each[0] for each in seen if torch.equal(each[0, : end - 5 - first], ids[first : end - 5])]
        assert matching
        behind = [each[end - first :] for each in matching]
        assert any((each == 7).all() for each in behind)


def test_blocks_end_when_all_texts_have_ended():
    pipeline = tiny_text_pipeline(letters("abcdefg", **END))
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[7] = 100.0
    output = pipeline(length=np.int64(100), block_length=np.int64(4), num_inference_steps=4, generator=seed())
    assert output.texts == [""] and (output.token_ids == 7).all() and output.nfe <= 4


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
def test_nfe_is_the_number_of_evaluations(told):
    pipeline = tiny_text_pipeline(scheduler_options={"predictor": "ancestral"}, time_conditioning=told)
    seen = record(pipeline)
    output = pipeline(batch_size=3, num_inference_steps=100, generator=seeds(0, 1, 2))
    assert output.nfe == len(seen)
    assert output.nfe_of_each.sum() == sum(len(tokens) for tokens in seen)
    # once in the beginning, then after every change: the time that a network is told is of what it sees
    assert output.nfe_of_each.max() <= 12
    # never the same twice
    every = [tuple(row) for tokens in seen for row in tokens.tolist() if set(row) != {7}]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("predictor", ["ancestral", "confidence", "tau_leaping"])
def test_skipped_evaluations_change_nothing(predictor):
    pipeline = tiny_text_pipeline(scheduler_options={"predictor": predictor})
    arguments = {"batch_size": 3, "num_inference_steps": 50}
    output = pipeline(**arguments, generator=seeds(0, 1, 2))
    assert output.nfe_of_each.max() < 50
    # the same network, which says that it is told the time
    pipeline.transformer.register_to_config(time_conditioning=True)
    again = pipeline(**arguments, generator=seeds(0, 1, 2))
    assert again.texts == output.texts and again.nfe >= output.nfe


@pytest.mark.parametrize("predictor", ["auto", "ancestral", "confidence", "dilated", "margin", "tweedie"])
@pytest.mark.parametrize("arguments", [{"num_inference_steps": 40}, {"prompt": "abcdefg", "num_inference_steps": 3}])
def test_with_masks_a_network_is_told_the_time_of_as_many(predictor, arguments):
    """As in training, in which the share of masks is 1 - alpha on average: beside a prompt it is less, and by an order
    another than that of the plan."""
    options = {"predictor": predictor, "noise": "cosine"}
    pipeline = tiny_text_pipeline(scheduler_options=options, time_conditioning=True)
    seen, path = [], pipeline.scheduler.path
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[1].double())))
    output = pipeline(batch_size=2, generator=seed(), **arguments)
    tokens, times = (torch.cat(each) for each in zip(*seen, strict=True))
    masked = (tokens == 7).double().mean(-1)
    assert masked.min() < 0.2 and output.nfe == len(seen)
    assert ((1 - path.alpha(times / 1000)) - masked).abs().max() < 2e-3  # up to alpha_min
    assert float(masked[0]) == (1.0 if "prompt" not in arguments else 5 / 12)


@pytest.mark.parametrize(
    "options",
    [
        {"process": "uniform", "predictor": "confidence"},
        {"process": "uniform", "corrector": "gibbs"},
        # the scale of what is taken as it is hangs on the time
        {"predictor": "tau_leaping", "prediction_type": "score"},
        {"predictor": "tweedie", "prediction_type": "score"},
    ],
)
def test_elsewhere_a_network_is_told_the_time_of_the_plan(options):
    scheduler = DiscreteScoreScheduler(7, **options)
    scheduler.set_timesteps(5)
    tokens = scheduler.init_noise((2, 4), seed()) * 0
    for timestep in scheduler.timesteps:
        assert scheduler.told_timesteps(tokens, timestep).tolist() == 2 * [float(timestep)]


def test_the_bound_beside_given_tokens_tells_a_network_what_sampling_tells_it():
    """Of a text that is longer than the model, whose last window has seen all but a token of it before."""
    pipeline = tiny_text_pipeline(time_conditioning=True)
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    pipeline.log_likelihood("abcdefgabcdef", num_samples=20, generator=seed())
    tokens, times = (torch.cat(each) for each in zip(*seen, strict=True))
    given = (tokens[:, :11] == torch.tensor([1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4])).all(1)
    masks = (tokens[given] == 7).sum(1)
    assert set(masks.tolist()) == {0, 1}
    assert torch.allclose(times[given], pipeline.scheduler.timestep(masks / 12 / 0.999), atol=1e-3)
    # the window before has no such tokens: its times are those of its noise
    assert len(times[~given].unique()) == 22


def test_a_function_that_begins_below_one_is_noise_of_shown_tokens_too():
    scheduler = DiscreteScoreScheduler(7, noise=lambda t: 0.995 - 0.99 * t)
    scheduler.set_timesteps(3)
    tokens = torch.tensor([[0, 1, 2], [7, 7, 7]])
    assert scheduler.told_timesteps(tokens, scheduler.timesteps[0]).tolist() == pytest.approx([0.0, 1000.0])


# --- guidance and classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_the_scheduler_is_given_both_sides_of_guidance(process):
    pipeline = tiny_text_pipeline(scheduler_options={"process": process}, num_classes=3, time_conditioning=True)
    network, tokens = pipeline.transformer, torch.tensor([[7, 1, 7, 3]] if process == "absorbing" else [[0, 1, 2, 3]])
    time = torch.tensor([400.0])
    null, own = (network(tokens, time, class_labels=torch.tensor([label])).sample for label in (3, 1))
    for scale, expected in [(2.5, [own, null]), (1.0, [own]), (0.0, [null])]:
        pipeline.prepare_guidance(scale, [1], 1)
        output = pipeline.evaluate(tokens, time)
        assert output.shape == (len(expected), 1, 4, 7) and (output - torch.stack(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"process": "uniform"}, {"predictor": "ancestral"}])
def test_guided_texts_are_steps_of_the_scheduler(options):
    pipeline = tiny_text_pipeline(scheduler_options=options, num_classes=3)
    output = pipeline(class_labels=[1, 2], num_inference_steps=4, guidance_scale=2.5, generator=seed(3))
    scheduler, network, generator = pipeline.scheduler, pipeline.transformer, seed(3)
    tokens, labels = scheduler.init_noise((2, 12), generator), torch.tensor([1, 2])
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            own, null = (network(tokens, timestep, class_labels=each).sample for each in (labels, torch.tensor([3, 3])))
            guides = {"origin_output": null, "guidance_scale": 2.5}
            tokens = scheduler.step(own, timestep, tokens, generator, **guides).prev_sample
    assert torch.equal(output.token_ids, tokens)


def test_classes_by_name_and_number():
    pipeline = tiny_text_pipeline(num_classes=2)
    pipeline.register_to_config(id2label={"0": "prose", "1": "verse"})
    texts = [
        pipeline(class_labels=labels, num_inference_steps=8, generator=seeds(0, 1)).texts
        for labels in (["prose", "verse"], [0, 1], torch.tensor([0, 1]), [1, 0])
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    with pytest.raises(ValueError, match="'poem' is unknown"):
        pipeline(class_labels="poem")
    guided = pipeline(class_labels=[0, 1], guidance_scale=3.0, num_inference_steps=8, generator=seeds(0, 1)).texts
    assert guided != texts[0]


def test_a_class_changes_the_bound():
    pipeline = tiny_text_pipeline(num_classes=2)
    without, of_class = (
        pipeline.log_likelihood(["abcd", "gfed"], class_labels=labels, generator=seed()) for labels in (None, [0, 1])
    )
    of_each = pipeline.log_likelihood(["abcd", "gfed"], class_labels=[0, 0], generator=seed())
    assert of_class.nats[0] == of_each.nats[0] and of_class.nats[1] != of_each.nats[1]
    assert (without.nats != of_class.nats).all()


# --- generators, callbacks, devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"predictor": "ancestral"}, {"process": "uniform", "corrector": "gibbs"}])
@pytest.mark.parametrize("arguments", [{}, {"length": 20, "block_length": 6}])
def test_a_text_depends_on_its_seed_only(options, arguments):
    pipeline = tiny_text_pipeline(letters("abcdefg", **END), scheduler_options=options)
    together = pipeline(batch_size=4, num_inference_steps=10, generator=seeds(3, 1, 4, 2), **arguments).texts
    alone = [pipeline(num_inference_steps=10, generator=seeds(number), **arguments).texts[0] for number in (3, 1, 4, 2)]
    assert together == alone


def test_callbacks_see_and_change_the_tokens():
    pipeline, seen = tiny_text_pipeline(), []

    def keep(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["token_ids"].clone(), pipe.num_timesteps))
        tokens = tensors["token_ids"]
        tokens[:, 0] = 4
        return {"token_ids": tokens}

    output = pipeline(batch_size=2, num_inference_steps=6, generator=seed(), callback_on_step_end=keep)
    assert [step for step, *_ in seen] == list(range(len(seen))) and seen[0][3] == pipeline.num_timesteps == 6
    assert all(text[0] == "e" for text in output.texts)
    assert sorted((each[1] for each in seen), reverse=True) == [each[1] for each in seen]

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    output = pipeline(num_inference_steps=6, generator=seed(), callback_on_step_end=stop)
    assert HIDDEN in output.texts[0]
    assert HIDDEN not in pipeline(num_inference_steps=6, generator=seed()).texts[0]


def test_a_callback_changes_guidance_and_labels():
    pipeline = tiny_text_pipeline(num_classes=3)
    arguments = {"class_labels": 1, "num_inference_steps": 8, "guidance_scale": 4.0}

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {"class_labels": tensors["class_labels"][-1:]}

    names = ("token_ids", "class_labels")
    changed = pipeline(
        **arguments, generator=seed(), callback_on_step_end=change, callback_on_step_end_tensor_inputs=names
    )
    assert changed.texts != pipeline(**arguments, generator=seed()).texts


def test_the_text_is_shown_as_it_forms(capsys):
    pipeline = tiny_text_pipeline(scheduler_options={"predictor": "first_hitting"})
    output = pipeline(num_inference_steps=12, generator=seed(), callback_on_step_end=show_text)
    shown = capsys.readouterr().out
    lines = [line.strip() for line in shown.split("\r")[1:]]
    assert lines[-1] == f"12/12 {output.texts[0]}" and shown.endswith("\n")
    hidden = [line.count(HIDDEN) for line in lines]
    assert hidden == list(range(11, -1, -1))


def test_half_precision_networks():
    pipeline = tiny_text_pipeline()
    tokens = pipeline.to(torch.bfloat16)(batch_size=2, num_inference_steps=6, generator=seed(), output_type="pt")
    assert tokens.texts is None and tokens.token_ids.dtype == torch.int64 and tokens.token_ids.shape == (2, 12)


def test_calls_in_several_threads_draw_what_they_draw_alone():
    pipeline = tiny_text_pipeline(num_classes=3)

    def draw(number):
        labels = number % 3
        return pipeline(class_labels=labels, guidance_scale=1.0 + number, num_inference_steps=8, generator=seed(number))

    with ThreadPoolExecutor(4) as pool:
        assert [each.texts for each in pool.map(draw, range(8))] == [draw(number).texts for number in range(8)]


def test_adapters_are_put_on_and_taken_off(tmp_path):
    pipeline = tiny_text_pipeline()
    plain = pipeline(batch_size=8, num_inference_steps=8, generator=seed()).texts
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    adapted = pipeline(batch_size=8, num_inference_steps=8, generator=seed()).texts
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer))
    other = tiny_text_pipeline()
    other.load_lora_weights(tmp_path)
    assert other(batch_size=8, num_inference_steps=8, generator=seed()).texts == adapted != plain
    other.unload_lora_weights()
    assert other(batch_size=8, num_inference_steps=8, generator=seed()).texts == plain


def test_a_call_leaves_the_pipeline_as_it_was():
    pipeline = tiny_text_pipeline()
    (texts,) = pipeline(num_inference_steps=6, generator=seed(), return_dict=False)
    (again,) = pipeline(num_inference_steps=6, generator=seed(), return_dict=False)
    assert texts == again and pipeline.scheduler.step_index is None


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saved_and_opened_again(tmp_path):
    pipeline = tiny_text_pipeline(letters("abcdefg", **END), num_classes=2)
    pipeline.register_to_config(id2label={"0": "prose", "1": "verse"})
    texts = pipeline(class_labels="verse", num_inference_steps=6, generator=seed()).texts
    pipeline.save_pretrained(tmp_path)
    opened = ScoreSDETextPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert opened(class_labels="verse", num_inference_steps=6, generator=seed()).texts == texts


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": ""}, "a prompt is empty"),
        ({"prompt": []}, "a prompt is a text"),
        ({"prompt": [3]}, "a prompt is a text"),
        ({"prompt": 3}, "a prompt is a text"),
        ({"prompt": "abx"}, "no token for 'x'"),
        ({"prompt": 13 * "a"}, "13 tokens, more than the length 12"),
        ({"prompt": 12 * "a"}, "fills all of the length 12"),
        ({"prompt": ["a", "b", "c"], "batch_size": 2}, "3 prompts were given for 2 texts"),
        ({"prompt": "a", "gap": ""}, "gap '' must be a text, and not empty"),
        ({"prompt": "a", "gap": 5}, "gap 5 must be a text"),
        ({"prompt": "a", "complete": True}, "needs an end mark"),
        ({"complete": True}, "is of prompts"),
        ({"length": 13}, "length 13 is more than the 12 tokens"),
        ({"length": 13, "block_length": 12}, "block_length 12 must be at most 11"),
        ({"length": 0}, "length 0 must be a whole number"),
        ({"block_length": 2.5}, "block_length 2.5"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": 2000.0}, "temperature 2000.0 must be a number from 0 to 1000"),
        ({"temperature": "1"}, "temperature '1' must be a number"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": 10**10}, "top_k 10000000000 must be a whole number from 1"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_p": 0}, "top_p 0 must be a number from 1e-06 to 1"),
        ({"top_p": 1e-9}, "top_p 1e-09 must be a number from 1e-06 to 1"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"output_type": "np"}, "output_type 'np' is unknown; choose one of text, pt"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": True}, "batch_size True must be a whole number"),
        ({"batch_size": 2, "generator": seeds(0)}, "1 generators were given for 2 samples"),
        ({"class_labels": 1}, "unconditional"),
        ({"guidance_scale": 2.0}, "needs class_labels"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, named):
    pipeline = tiny_text_pipeline()
    seen = record(pipeline)
    with pytest.raises(ValueError, match=named):
        pipeline(**arguments)
    assert not seen


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "either texts or token_ids"),
        ({"texts": []}, "a text or a list of texts"),
        ({"texts": ["ab", ""]}, "text 1 is empty"),
        ({"texts": "xyz"}, "no token for 'x', 'y', 'z'"),
        ({"texts": "ab", "filled": True}, "needs an end mark"),
        ({"texts": "ab", "num_samples": 0}, "num_samples 0"),
        ({"texts": "ab", "num_samples": 2.5}, "num_samples 2.5 must be a whole number"),
        ({"texts": "ab", "batch_size": "8"}, "batch_size '8' must be a whole number"),
        ({"texts": "ab", "generator": seeds(0)}, "must be one torch.Generator, of all draws"),
        ({"texts": "ab", "class_labels": 0}, "unconditional"),
        ({"token_ids": torch.tensor([[0, 7]])}, "from 0 to 7 are out of range: this model has ids 0 to 6"),
        ({"token_ids": torch.tensor([[-1, 2]])}, "out of range"),
        ({"token_ids": torch.zeros(2, 3)}, "int64, not torch.float32"),
    ],
)
def test_bad_texts_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        tiny_text_pipeline().log_likelihood(**arguments)


def test_guidance_beyond_what_a_step_takes_is_refused_before_any_work():
    pipeline = tiny_text_pipeline(num_classes=3)
    seen = record(pipeline)
    with pytest.raises(ValueError, match="guidance_scale 10000000.0 must be a number from"):
        pipeline(class_labels=1, guidance_scale=1e7)
    assert not seen


def test_a_complete_prompt_without_gaps_asks_for_gaps_alone():
    pipeline = tiny_text_pipeline(letters("abcdefg", **END))
    with pytest.raises(ValueError, match=r"leaves nothing to fill in, .*: write .MASK. where .* be filled in$"):
        pipeline(prompt="abc", complete=True)


def test_a_temperature_beside_one_that_falls_is_refused():
    pipeline = tiny_text_pipeline(scheduler_options={"final_temperature": 0.5})
    with pytest.raises(
        ValueError, match="temperature 0.0 would have no effect: .* final_temperature 0.5; leave it out"
    ):
        pipeline(temperature=0.0, num_inference_steps=2)
    assert len(pipeline(num_inference_steps=2, generator=seed()).texts) == 1


def test_wrong_parts_and_ids_are_refused_by_name():
    pipeline = tiny_text_pipeline()
    scheduler, network, tokenizer = pipeline.scheduler, pipeline.transformer, pipeline.tokenizer
    with pytest.raises(ValueError, match="needs a network with a config, such as a DiTModel, not a NoneType"):
        ScoreSDETextPipeline(scheduler, None, tokenizer)
    for names in (["a", "b"], {"x": "b"}, {-1: "b"}):
        with pytest.raises(ValueError, match="id2label .* must be {label: class name}"):
            ScoreSDETextPipeline(scheduler, network, tokenizer, id2label=names)
    for ids, named in (
        (torch.tensor([0, 1]), "must be a tensor .texts, length."),
        (torch.tensor([[-1]]), "out of range"),
        (torch.tensor([[8]]), "out of range: this model has ids 0 to 7"),
    ):
        with pytest.raises(ValueError, match=named):
            pipeline.decode(ids)
    for returned, named in (
        (torch.zeros(1, 5, dtype=torch.int64), r"returned token_ids of shape \(1, 5\): return as many .* \(1, 12\)"),
        (torch.full((1, 12), 9), "out of range"),
        (torch.zeros(1, 12), "int64, not torch.float32"),
    ):
        with pytest.raises(ValueError, match=named):
            pipeline(num_inference_steps=1, callback_on_step_end=lambda *_, found=returned: {"token_ids": found})


def test_a_call_may_stop_before_its_first_evaluation():
    pipeline = tiny_text_pipeline()
    plan = pipeline.scheduler.__class__.set_timesteps

    def stop(self, *arguments, **options):
        pipeline._interrupt = True
        plan(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.scheduler.__class__, "set_timesteps", stop)
        output = pipeline(batch_size=2, num_inference_steps=3)
    assert output.texts == [12 * HIDDEN] * 2 and output.nfe == 0 and output.nfe_of_each.tolist() == [0, 0]


def test_what_is_shown_in_the_end_is_the_text():
    pipeline = tiny_text_pipeline(letters("abcdefg", **END))
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[7] = 100.0
    shown = []
    output = pipeline(
        prompt="ab[MASK][MASK]c",
        num_inference_steps=4,
        callback_on_step_end=lambda pipe, step, timestep, tensors: shown.append(pipe.decode(tensors["token_ids"])[0]),
    )
    assert shown[-1] == output.texts[0] == "abc"
    # outside of a call nothing is known of a prompt
    assert pipeline.decode(output.token_ids) == ["ab"]


def test_filled_texts_are_those_of_training():
    pipeline = tiny_text_pipeline(letters("abcdefg", **END))
    filled = pipeline.log_likelihood("abc", filled=True, generator=seed(), num_samples=4)
    rows = pipeline.log_likelihood(token_ids=torch.tensor([[0, 1, 2] + 9 * [7]]), generator=seed(), num_samples=4)
    assert torch.allclose(filled.nats, rows.nats)
    for found in (filled, rows):  # what fills up behind the end mark is no token
        assert found.tokens.tolist() == [4] and found.characters.tolist() == [3]
    # end marks between texts count
    packed = pipeline.log_likelihood(token_ids=torch.tensor([[0, 7, 1, 7]]), generator=seed())
    assert packed.tokens.tolist() == [4]
    with pytest.raises(ValueError, match="13 tokens, more than the model's 12"):
        pipeline.log_likelihood(13 * "a", filled=True)


def test_components_of_other_tokens_are_refused():
    pipeline, letters_of_six = tiny_text_pipeline(), letters("abcdef")
    parts = {"scheduler": pipeline.scheduler, "transformer": pipeline.transformer, "tokenizer": pipeline.tokenizer}
    for changed, named in (
        ({"tokenizer": letters_of_six}, "PreTrainedTokenizerFast has 6 tokens|TokenizersBackend has 6 tokens"),
        ({"scheduler": DiscreteScoreScheduler(8)}, "DiscreteScoreScheduler has 8 tokens"),
        ({"scheduler": ScoreSDEScheduler()}, "needs a DiscreteScoreScheduler, not a ScoreSDEScheduler"),
        ({"scheduler": DiscreteScoreScheduler(7, timestep_type="index")}, "timestep_type 'index' counts steps"),
        ({"transformer": tiny_dit()}, "is of numbers, not of tokens"),
        ({"tokenizer": None}, "needs a fast tokenizer"),
    ):
        with pytest.raises(ValueError, match=named):
            ScoreSDETextPipeline(**(parts | changed))
    # those that are set later, too
    pipeline.scheduler = DiscreteScoreScheduler(8)
    with pytest.raises(ValueError, match="8 tokens"):
        pipeline(num_inference_steps=2)


@pytest.mark.parametrize("which", ["network", "scheduler"])
def test_pipelines_of_numbers_refuse_tokens(which):
    pipeline = tiny_text_pipeline()
    network = pipeline.transformer if which == "network" else tiny_dit()
    scheduler = pipeline.scheduler if which == "scheduler" else ScoreSDEScheduler()
    with pytest.raises(ValueError, match="is of tokens .vocab_size 7.: use it in a ScoreSDETextPipeline"):
        ScoreSDEPipeline(scheduler, network)


def test_every_state_has_a_text():
    pipeline = exact_pipeline()
    assert pipeline.decode(all_sequences(4, 2))[3] == "a" + HIDDEN
