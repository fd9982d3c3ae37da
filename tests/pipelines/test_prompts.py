"""Prompts: texts encoded as in training, what guidance leads away from, and where the encoder comes from."""

import json
import os
import subprocess
import sys

import pytest
import torch
from bundles import LOAD_BY_REMOTE_CODE
from safetensors.torch import save_file
from tiny import seeded, tiny_pipeline
from words import ENCODERS, SETTINGS, WIDTH, prompt_pipeline, save_encoder, tiny_encoder, tiny_tokenizer, worded_network

from score_sde import ScoreSDEInversePipeline, ScoreSDEPipeline, load_bundle, save_bundle
from score_sde.pipelines.operators import super_resolution
from score_sde.pipelines.prompts import PROMPT_SETTINGS, encode, encoder_width, fingerprint, open_text_encoder, tokenize


PROMPTS = ["a red hat", "the blue dress with green dots"]


def draw(pipeline, **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(0)} | arguments
    return pipeline(**arguments).images


def by_hand(pipeline, texts):
    """What the encoder itself makes of texts, and which of it counts."""
    tokens = pipeline.tokenizer(texts, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    mask = tokens.attention_mask.bool()
    return hidden.masked_fill(~mask[..., None], 0), mask


def test_a_prompt_is_what_its_encoder_makes_of_it():
    pipeline = prompt_pipeline()
    embeds, mask = by_hand(pipeline, PROMPTS)
    assert mask.sum(1).tolist() == [5, 8]
    told = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    for scale in (1.0, 3.0):
        expected = draw(pipeline, conditions=told, guidance_scale=scale)
        assert (draw(pipeline, prompt=PROMPTS, guidance_scale=scale) - expected).abs().max() < 1e-5
        given = {"prompt_embeds": embeds, "prompt_attention_mask": mask.long()}
        assert (draw(pipeline, **given, guidance_scale=scale) - expected).abs().max() < 1e-5
    assert (draw(pipeline, prompt=PROMPTS[0], batch_size=2) - expected).abs().max() > 1e-2
    one = draw(pipeline, prompt=PROMPTS[0], batch_size=2)
    assert torch.equal(one, draw(pipeline, prompt=[PROMPTS[0]] * 2))


def test_guidance_leads_away_from_a_negative_prompt():
    pipeline = prompt_pipeline()
    embeds, mask = by_hand(pipeline, [*PROMPTS, "a bag"])
    scheduler, x = pipeline.scheduler, torch.randn(2, 1, 4, 4, generator=seeded(0))
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            told = pipeline.transformer(x, timestep, None, embeds[:2], mask[:2]).sample
            away = pipeline.transformer(x, timestep, None, embeds[2:].expand(2, -1, -1), mask[2:].expand(2, -1)).sample
        x = scheduler.step(away + 3 * (told - away), timestep, x).prev_sample
    found = draw(pipeline, prompt=PROMPTS, negative_prompt="a bag", guidance_scale=3.0)
    assert (found - x).abs().max() < 1e-4
    given = {"negative_prompt_embeds": embeds[2:], "negative_prompt_attention_mask": mask[2:]}
    assert (draw(pipeline, prompt=PROMPTS, **given, guidance_scale=3.0) - x).abs().max() < 1e-4
    # an empty one is none, which is what is led away from by default
    plain = draw(pipeline, prompt=PROMPTS, guidance_scale=3.0)
    assert (plain - x).abs().max() > 1e-2
    assert (draw(pipeline, prompt=PROMPTS, negative_prompt="", guidance_scale=3.0) - plain).abs().max() < 1e-5
    # and may be all that there is
    alone = draw(pipeline, negative_prompt=["a bag", "a hat"], batch_size=2, guidance_scale=2.0)
    assert (alone - draw(pipeline, batch_size=2)).abs().max() > 1e-2


def test_no_prompt_and_an_empty_one_are_none():
    pipeline = prompt_pipeline(worded_network(pooled_projection_dim=WIDTH), settings=SETTINGS | {"pooled": True})
    told = pipeline.encode_prompt(["", "a hat"])
    null = pipeline.transformer.null_conditions(told)
    assert all(torch.equal(told[name][0], null[name][0]) for name in told) and len(told) == 3
    mean = told["encoder_hidden_states"][1, :4].mean(0)
    assert (told["pooled_projections"][1] - mean).abs().max() < 1e-6
    assert (draw(pipeline, prompt="") - draw(pipeline)).abs().max() < 1e-5
    assert (draw(pipeline, prompt="a hat") - draw(pipeline)).abs().max() > 1e-3


def test_classes_and_prompts_together():
    pipeline = prompt_pipeline(worded_network(num_classes=3))
    drawn = [draw(pipeline, class_labels=label, prompt=prompt) for label in (0, 1) for prompt in PROMPTS]
    for i in range(4):
        for j in range(i):
            assert (drawn[i] - drawn[j]).abs().max() > 1e-3


def test_other_pipelines_are_told_by_conditions():
    solver = prompt_pipeline(pipeline_class=ScoreSDEInversePipeline)
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    images = [
        solver(
            super_resolution(2), torch.zeros(1, 1, 2, 2), generator=seeded(0), conditions=conditions, **arguments
        ).images
        for conditions in (None, solver.encode_prompt("a red hat"))
    ]
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ENCODERS)
def test_every_family_of_encoders(family, tmp_path):
    """Opened from its folder, it does what it did; words behind the last one change nothing."""
    encoder, tokenizer = open_text_encoder(save_encoder(tmp_path, family))
    original = tiny_encoder(family)
    settings = PROMPT_SETTINGS | SETTINGS
    ids, mask = tokenize(tokenizer, [*PROMPTS, ""], 8)
    told = encode(encoder, ids, mask, settings)
    assert told["encoder_hidden_states"].shape == (3, 8, encoder_width(encoder, settings)) == (3, 8, WIDTH)
    reader = original.get_encoder() if original.config.is_encoder_decoder else original
    with torch.no_grad():
        short = reader(input_ids=ids[:1, :5]).last_hidden_state
        deep = reader(input_ids=ids[1:2], output_hidden_states=True).hidden_states
    assert (told["encoder_hidden_states"][:1, :5] - short).abs().max() < 1e-5
    assert not told["encoder_hidden_states"][:1, 5:].any() and not told["encoder_hidden_states"][2].any()
    assert told["encoder_attention_mask"].sum(1).tolist() == [5, 8, 1]
    both = encode(encoder, ids, mask, settings | {"layers": [1, -2]})["encoder_hidden_states"]
    assert both.shape[2] == encoder_width(encoder, settings | {"layers": [1, -2]})
    assert (both[1:2] - torch.cat([deep[1], deep[-2]], dim=2)).abs().max() < 1e-5
    assert fingerprint(encoder, tokenizer) == fingerprint(*open_text_encoder(str(tmp_path)))
    next(encoder.parameters()).data[0] += 1
    assert fingerprint(encoder, tokenizer) != fingerprint(*open_text_encoder(str(tmp_path)))


def test_clip_whole_is_opened_as_the_part_that_reads(tmp_path):
    import transformers

    text, vision = ENCODERS["clip"][1].to_dict(), {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4})
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    encoder, _ = open_text_encoder(str(tmp_path))
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        expected = whole.text_model(ids).last_hidden_state
        assert (encoder(ids).last_hidden_state - expected).abs().max() < 1e-5


def test_a_tokenizer_without_special_tokens_may_have_nothing_to_say():
    ids, mask = tokenize(tiny_tokenizer(special=False), ["", "a hat"], 4)
    told = encode(tiny_encoder("qwen"), ids, mask, PROMPT_SETTINGS)
    assert told["encoder_hidden_states"].isfinite().all() and not told["encoder_hidden_states"][0].any()


# --- saved, or named ----------------------------------------------------------------------------------------------


def test_the_encoder_is_saved_with_the_pipeline(tmp_path):
    pipeline = prompt_pipeline()
    folder = save_bundle(pipeline, tmp_path / "bundle")
    for opened in (load_bundle(folder), ScoreSDEPipeline.from_pretrained(folder)):
        opened.set_progress_bar_config(disable=True)
        assert opened.prompt_settings == PROMPT_SETTINGS | SETTINGS
        assert (draw(opened, prompt=PROMPTS) - draw(pipeline, prompt=PROMPTS)).abs().max() < 1e-5
    # again, from what was opened; and without
    save_bundle(opened, tmp_path / "again")
    assert (draw(load_bundle(tmp_path / "again"), prompt=PROMPTS) - draw(pipeline, prompt=PROMPTS)).abs().max() < 1e-5
    bare = load_bundle(folder, text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="this pipeline has no text encoder: pass text_encoder= and tokenizer="):
        draw(bare, prompt="a hat")
    assert draw(bare).isfinite().all()


def test_it_opens_by_its_own_code_where_the_package_is_not(tmp_path):
    pipeline = prompt_pipeline(worded_network(num_classes=3))
    folder, told = save_bundle(pipeline, tmp_path / "bundle"), {"prompt": PROMPTS, "negative_prompt": "a bag"}
    told |= {"guidance_scale": 2.0, "class_labels": [1, 0]}
    image = draw(pipeline, output_type="pt", generator=seeded(3), **told)
    save_file({"image": image}, tmp_path / "image.safetensors")
    command = [sys.executable, "-c", LOAD_BY_REMOTE_CODE, tmp_path / "image.safetensors", folder, json.dumps(told)]
    environment = dict(os.environ, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    difference, package = json.loads(result.stdout.splitlines()[-1])
    assert difference < 1e-5 and package == "diffusers_modules"


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """somebody/words, which the libraries find in the working folder before they look on the Hub."""
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "somebody" / "words")
    return "somebody/words"


def test_an_encoder_that_is_named_is_opened_when_it_is_needed_and_not_saved(on_the_hub, tmp_path):
    print_of = fingerprint(tiny_encoder(), tiny_tokenizer())
    settings = SETTINGS | {"text_encoder": on_the_hub, "fingerprint": print_of}
    pipeline = prompt_pipeline(encoder=False, settings=settings)
    expected = draw(prompt_pipeline(), prompt=PROMPTS, guidance_scale=2.0)
    folder = save_bundle(pipeline, tmp_path / "bundle")
    opened = load_bundle(folder)
    assert opened.text_encoder is None and opened.takes_prompts and opened._named_encoder is None
    assert (draw(opened, prompt=PROMPTS, guidance_scale=2.0) - expected).abs().max() < 1e-5
    assert opened._named_encoder is not None
    save_bundle(opened, folder)
    assert not (tmp_path / "bundle" / "text_encoder").exists()
    opened = load_bundle(folder)
    save_encoder(on_the_hub, "qwen")
    with pytest.raises(ValueError, match="'somebody/words' is not the one that this model was trained with"):
        draw(opened, prompt=PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "a prompt is a text, or a list of texts, not 3"),
        ({"prompt": []}, r"a prompt is a text, or a list of texts, not \[\]"),
        ({"prompt": ["a", None]}, "a prompt is a text, or a list of texts"),
        ({"prompt": PROMPTS, "batch_size": 3}, "encoder_hidden_states has 2 elements for 3 samples"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 8, 16)}, "prompt and prompt_embeds were given"),
        ({"prompt_attention_mask": torch.ones(1, 8)}, "prompt_attention_mask needs prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 8)}, r"prompt_embeds must be a tensor \(batch, sequence, width\)"),
        (
            {"prompt_embeds": torch.full((1, 8, 16), torch.nan)},
            "encoder_hidden_states holds values that are not finite",
        ),
        ({"prompt_embeds": torch.zeros(1, 8, 7)}, r"shape \(1, 8, 7\); this model takes \(1, sequence, 16\)"),
        (
            {"prompt": "a", "conditions": {"encoder_hidden_states": torch.zeros(1, 8, 16)}},
            "encoder_hidden_states were given twice: by prompt, and among the conditions",
        ),
        ({"prompt": "a", "negative_prompt": "a hat"}, "a negative prompt needs a guidance_scale other than 1"),
        ({"guidance_scale": 2.0}, "guidance_scale 2.0 needs a prompt or its embeddings"),
        (
            {"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 5, 16), "guidance_scale": 2.0},
            r"of the prompt and the negative prompt must be of one shape, not \[\(1, 8, 16\), \(1, 5, 16\)\]",
        ),
    ],
)
def test_prompts_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(prompt_pipeline(), **arguments)


def test_what_encoder_and_network_must_agree_in():
    with pytest.raises(ValueError, match="a BertModel, makes vectors of width 16; the network takes 12"):
        draw(prompt_pipeline(worded_network(cross_attention_dim=12)), prompt="a hat")
    with pytest.raises(ValueError, match="40 tokens of a text .* are more than the 32 that its encoder, a BertModel"):
        draw(prompt_pipeline(settings={"max_tokens": 40}), prompt="a hat")
    with pytest.raises(ValueError, match="layer 3 of the text encoder, a BertModel, is not among its -3 to 2"):
        draw(prompt_pipeline(settings=SETTINGS | {"layers": [3]}), prompt="a hat")
    with pytest.raises(ValueError, match="this pipeline has no text encoder"):
        draw(tiny_pipeline(), prompt="a hat")
    with pytest.raises(ValueError, match="text_encoder and tokenizer belong together"):
        ScoreSDEPipeline(prompt_pipeline().scheduler, worded_network(), text_encoder=tiny_encoder())
    for settings, message in (
        ({"max_length": 8}, "'max_length' is unknown; the settings are max_tokens, layers"),
        ({"max_tokens": 0}, "max_tokens 0 must be a whole number from 1 to 10,000"),
        ({"layers": []}, r"layers \[\] must be a list of whole numbers"),
        ({"pooled": 1}, "pooled 1 must be true or false"),
        ({"text_encoder": 1}, "text_encoder 1 must be a short text"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt_pipeline(settings=settings)


def test_prompts_that_are_cut_off_are_named():
    pipeline = prompt_pipeline()
    long = "the blue dress with green dots of the red hat"
    with pytest.warns(UserWarning, match="cut off after 8 tokens: 'the blue dress with green dots of the red hat'"):
        found = draw(pipeline, prompt=long)
    assert torch.equal(found, draw(pipeline, prompt="the blue dress with green dots"))


def test_what_is_no_text_encoder(tmp_path):
    with pytest.raises(ValueError, match=r"text encoder '.*' cannot be opened: .*Give a folder, or the id"):
        open_text_encoder(str(tmp_path))
