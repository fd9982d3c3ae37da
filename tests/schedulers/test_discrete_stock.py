"""Exchange with diffusers' discrete schedulers and the pipelines made for them."""

import pytest
import torch
from diffusers import (
    AmusedScheduler,
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
)
from enumerable import agrees, counts, number_of
from tokenizers import Tokenizer, models
from torch import nn
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerFast
from transformers.modeling_outputs import MaskedLMOutput

from score_sde import DiscreteScoreScheduler


V, N = 3, 20000
STOCK = {
    "ddim": DiscreteDDIMScheduler(),
    "entropy_bound": EntropyBoundScheduler(entropy_bound=0.6),
    "block_refinement": BlockRefinementScheduler(threshold=0.8),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same_counts(first, second):
    """Whether two lots of sequences (N, L) are of one distribution: a chi-square test of each against the mean."""
    both = torch.stack([counts(first, V + 1), counts(second, V + 1)]).double()
    return [1.0 if torch.equal(*both) else agrees(each, both.mean(0) / len(first)) for each in both]


def ours(stock, **options):
    return DiscreteScoreScheduler.from_config(stock.config, vocab_size=V, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", STOCK)
def test_on_the_uniform_process_trajectories_have_the_distribution_of_the_stock_scheduler(name, steps, temperature):
    """With logits of a table for each sequence of tokens, and both schedulers called as DiffusionGemma calls them."""
    if name == "entropy_bound" and temperature:
        pytest.skip("its temperature is the scheduler's own")
    table = 2 * torch.randn(V**4, 4, V, generator=seeded(0))
    stock, results = STOCK[name], []
    mine = ours(stock, process="uniform")
    # the last step of the stock scheduler leaves noise at what is not accepted; ours leads to clean tokens
    count = steps - 1 if name == "entropy_bound" else steps
    for scheduler, seed in [(stock, 1), (mine, 2)]:
        x, generator = torch.randint(V, (N, 4), generator=seeded(3)), seeded(seed)
        scheduler.set_timesteps(steps)
        for step in range(count):
            options = {} if name == "entropy_bound" and scheduler is stock else {"temperature": temperature}
            out = scheduler.step(table[number_of(x, V)], step, x, generator=generator, **options)
            x = out.prev_sample
        results.append(x)
        if count:
            assert out.pred_logits.shape == (N, 4, V)
    assert min(same_counts(*results)) > 1e-3


def test_gibbs_is_step_correct_of_the_stock_scheduler():
    stock = DiscreteDDIMScheduler(corrector_steps=2, corrector_k=1, corrector_selection_tau=0.7)
    table = 2 * torch.randn(V**4, 4, V, generator=seeded(0))
    x, results = torch.randint(V, (N, 4), generator=seeded(3)), []
    mine = ours(stock)
    assert (mine.config.corrector, mine.config.corrector_steps, mine.config.corrector_k) == ("gibbs", 2, 1)
    for scheduler in (stock, mine):
        scheduler.set_timesteps(4)
        results.append(scheduler.step_correct(table[number_of(x, V)], 1, x, generator=seeded(5)).prev_sample)
    assert min(same_counts(*results)) > 1e-3 and not torch.equal(results[0], x)


def test_the_temperature_of_entropy_bound_falls_as_in_the_stock_scheduler():
    stock = EntropyBoundScheduler(t_max=0.9, t_min=0.2)
    mine, logits = ours(stock), torch.randn(1, 4, V, generator=seeded(0))
    for scheduler in (stock, mine):
        scheduler.set_timesteps(5)
    for step in range(5):
        x = torch.randint(V, (1, 4), generator=seeded(step))
        found, expected = (each.step(logits, step, x).pred_logits for each in (mine, stock))
        assert (found - expected).abs().max() < 1e-5


class OfTable(nn.Module):
    """Logits of every context's block from a table of random numbers, which knows tokens and places; a mask among
    them."""

    def __init__(self, block, mask):
        super().__init__()
        self.block, self.mask = block, mask
        self.register_buffer("table", 2 * torch.randn((V + 1) ** block, block, V + 1, generator=seeded(0)))

    @property
    def device(self):
        return self.table.device

    @property
    def dtype(self):
        return self.table.dtype

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, V + 1)
        logits[:, -self.block :] = self.table[number_of(input_ids[:, -self.block :], V + 1)]
        # networks learn that the mask is no clean token
        logits[..., self.mask] = -40.0
        return MaskedLMOutput(logits=logits)


def llada(scheduler, mask, **options):
    pipeline = LLaDA2Pipeline(OfTable(4, mask), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "editing_threshold": None, "eos_early_stop": False, "temperature": 1.0}
    prompt = torch.full((2000, 4), 2)
    call |= {"input_ids": prompt, "gen_length": 4, "block_length": 4, "mask_token_id": mask, "output_type": "seq"}
    return pipeline(**call | {"generator": seeded(1)} | options).sequences


@pytest.mark.parametrize("mask", [1, 3])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.6}, {"temperature": 0.0}, {"top_k": 2}])
def test_llada2_generates_the_same_with_ours(mask, options):
    # as many steps as tokens: with fewer ours spreads what a threshold leaves over the steps that are left
    results = []
    for seed, scheduler in enumerate([BlockRefinementScheduler(), ours(BlockRefinementScheduler())]):
        results.append(llada(scheduler, mask, generator=seeded(seed), **{"threshold": 1.1} | options))
    assert not (results[1] == mask).any()
    assert min(same_counts(*results)) > 1e-3


@pytest.mark.parametrize("predictor", ["first_hitting", "margin", "entropy_bounded", "ancestral"])
def test_llada2_takes_our_predictors(predictor):
    tokens = llada(ours(BlockRefinementScheduler(), predictor=predictor, threshold=None), 3, threshold=1.0)
    assert tokens.shape == (2000, 4) and int(tokens.max()) < 3


def test_llada2_stops_at_the_end_of_a_text():
    scheduler = ours(BlockRefinementScheduler())
    tokens = torch.tensor([[0, 2, 1, 3], [0, 3, 1, 3], [2, 0, 0, 3], [0, 0, 2, 1]])
    put_in = torch.ones_like(tokens, dtype=torch.bool)
    finished = torch.tensor([False, False, False, False])
    arguments = {"eos_token_id": 1, "mask_token_id": 3, "prompt_length": 1, "finished": finished}
    arguments |= {"cur_x": tokens, "sampled_tokens": tokens, "final_transfer": put_in}
    expected = BlockRefinementScheduler().check_eos_finished(**arguments | {"finished": finished.clone()})
    assert torch.equal(scheduler.check_eos_finished(**arguments), expected)
    assert expected.tolist() == [True, False, False, True]


def gemma(scheduler):
    """DiffusionGemma's pipeline around a tiny random model of 8 tokens."""
    text = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"], "eos_token_id": 1}
    text |= {"per_layer_config": {}, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    vision = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "position_embedding_size": 16}
    vision |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=4)
    words = Tokenizer(models.WordLevel({each: index for index, each in enumerate("abcdefgh")}, unk_token="a"))
    processor = PreTrainedTokenizerFast(tokenizer_object=words, chat_template="{{ messages[0]['content'] }}")
    pipeline = DiffusionGemmaPipeline(DiffusionGemmaForBlockDiffusion(config).eval(), scheduler, processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow  # for what it imports
@pytest.mark.parametrize("name", STOCK)
def test_diffusion_gemma_generates_with_ours(name):
    stock = DiscreteDDIMScheduler(corrector_steps=1) if name == "ddim" else STOCK[name]
    pipeline = gemma(DiscreteScoreScheduler.from_config(stock.config, vocab_size=8, process="uniform"))
    call = {"prompt": "c", "gen_length": 8, "num_inference_steps": 4, "output_type": "seq", "eos_early_stop": False}
    first, again = (pipeline(**call, generator=seeded(0)).sequences for _ in range(2))
    assert first.shape == (1, 8) and int(first.max()) < 8 and torch.equal(first, again)


def test_refusals():
    for stock in STOCK.values():
        with pytest.raises(ValueError, match="does not say the vocabulary: pass vocab_size"):
            DiscreteScoreScheduler.from_config(stock.config)
    with pytest.raises(ValueError, match="AmusedScheduler has no counterpart here"):
        ours(AmusedScheduler(mask_token_id=3))
    with pytest.raises(ValueError, match="editing_threshold 0.9 replaces tokens that are shown"):
        ours(BlockRefinementScheduler(editing_threshold=0.9))
    with pytest.raises(ValueError, match="editing_threshold 0.5 replaces tokens that are shown"):
        llada(ours(BlockRefinementScheduler()), 3, editing_threshold=0.5)
    with pytest.raises(ValueError, match="process 'uniform' has no mask"):
        llada(ours(DiscreteDDIMScheduler()), 3, threshold=1.0)
    with pytest.raises(ValueError, match="mask_token_id 4 must be one of 4 logits"):
        scheduler = ours(BlockRefinementScheduler())
        scheduler.set_timesteps(1)
        scheduler.step(torch.zeros(1, 2, 4), 0, torch.zeros(1, 2).long(), mask_token_id=4)
    with pytest.raises(ValueError, match="step_correct is for corrector 'gibbs'"):
        scheduler.step_correct(torch.zeros(1, 2, 3), 0, torch.zeros(1, 2).long())
