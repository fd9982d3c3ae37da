"""Generation of text, or of molecules and other data that are written as text, by score-based diffusion over tokens."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypeGuard

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput

from .adapters import AdapterMixin
from .bundle_files import read_config  # noqa: F401 (diffusers copies the files that this one names, and no further)
from .bundling import BundleMixin
from .calls import CallMixin
from .carried_code import write_code  # noqa: F401
from .conditions import null_conditions
from .guidance import run, sides
from .protocols import Conditions, Generators, Network
from .text_likelihood import TextLikelihood, text_likelihood
from .texts import GAP, decode_texts, encode_prompts, end_ids, lengths_of_texts
from .wording import check_choice, check_count, check_finite, one_line, quoted
from .writing import whole_file  # noqa: F401


OUTPUT_TYPES = ("text", "pt")


@dataclass
class ScoreSDETextPipelineOutput(BaseOutput):
    """Output of a pipeline of tokens.

    texts: up to their end mark, where the tokenizer has one; None for output_type "pt".
    token_ids: (B, length), int64; behind the end mark what fills up.
    nfe: number of network evaluations of the call, each of the sequences that had changed since (with guidance, of two
        samples for each).
    nfe_of_each: how many of them each sequence took part in, (B,).
    """

    texts: list[str] | None
    token_ids: torch.Tensor
    nfe: int
    nfe_of_each: torch.Tensor


class Evaluations:
    """The network's output for the tokens of a block, as `evaluate` has it, evaluated again for those sequences alone
    that it may have changed of: that changed themselves, or of which the network is told another time.

    call: the pipeline as the call sees it, whose conditions and guidance callbacks may change.
    """

    def __init__(self, call, tokens):
        self.call, self.told = call, None
        # of each sequence, what it was evaluated for
        self.tokens, self.timesteps = torch.full_like(tokens, -1), torch.full((len(tokens),), -1.0).to(tokens.device)
        self.output = torch.zeros(1, *tokens.shape, call.vocab_size, device=tokens.device)

    def __call__(self, tokens, timestep, settled):
        """(output (1 or 2, B, L, V), which sequences were evaluated (B,)) for tokens (B, L); those that are `settled`
        (B,) need none, as nothing can change them. None where all are."""
        told = [self.call._guidance_scale, *self.call._conditions.values()]
        is_told_the_same = self.told is not None and all(a is b for a, b in zip(told, self.told, strict=True))
        timesteps, stale = self.call.scheduler.told_timesteps(tokens, timestep), ~settled
        if is_told_the_same:
            changed = (tokens != self.tokens).any(1)
            stale &= changed | (timesteps != self.timesteps) if self.call.tells_time else changed
        self.told = told
        # the only time in a step that the host waits for a device
        rows = stale.nonzero()[:, 0]
        if len(rows) == len(tokens):
            self.output, self.tokens, self.timesteps = self.call.evaluate(tokens, timesteps), tokens, timesteps
        elif len(rows):
            new = self.call.evaluate(tokens, timesteps, rows)
            # a callback that begins or ends guidance lets all be evaluated anew, but those that nothing can change
            before = self.output if len(self.output) == len(new) else self.output[:1].expand(len(new), -1, -1, -1)
            self.output = before.index_copy(1, rows, new)
            self.tokens = self.tokens.index_copy(0, rows, tokens[rows])
            self.timesteps = self.timesteps.index_copy(0, rows, timesteps[rows])
        elif bool(settled.all()):
            return None
        return self.output, stale


class ScoreSDETextPipeline(CallMixin, BundleMixin, AdapterMixin, DiffusionPipeline):  # type: ignore[misc]  # a bundle has fewer options
    """Generate text from a score-based diffusion model of tokens, fill in gaps of it, or bound its likelihood.

    Args:
        scheduler: a `DiscreteScoreScheduler`.
        transformer: a `DiTModel` with a vocab_size, or another network that maps token ids (B, L) and timesteps (B,) to
            logits (B, L, V). One whose config says time_conditioning=False is evaluated only where tokens changed.
        tokenizer: a fast tokenizer of `transformers` of the network's V tokens. Its eos_token, where it has one, ends
            a text; pad_token, or the same, fills up behind it.
        id2label: {label: class name}, so that classes can be asked for by name.

    There is no attention mask: what is shorter than the model's length is filled up by tokens, as in training.

    Calls may run in several threads on one pipeline, as those of `ScoreSDEPipeline`.
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]  # declared as None
    _callback_tensor_inputs = ["token_ids"]
    # of one call: where the last token stands that each prompt states
    _last_stated: torch.Tensor | None = None

    transformer: Network

    def __init__(self, scheduler, transformer, tokenizer, id2label: dict | None = None):
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer, tokenizer=tokenizer)
        check_names(id2label)
        # JSON keys are strings
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()} if id2label else None)
        self.check_components()

    def check_components(self):
        """Raise ValueError for a scheduler, a network and a tokenizer that are not of the same tokens."""
        scheduler, network, tokenizer = self.scheduler, self.transformer, self.tokenizer
        if not hasattr(scheduler, "clean_log_probs"):
            raise ValueError(
                f"a ScoreSDETextPipeline needs a DiscreteScoreScheduler, not a {type(scheduler).__name__}: make one by "
                f"DiscreteScoreScheduler(vocab_size=...), as the network was trained"
            )
        if scheduler.config.timestep_type != "time":
            raise ValueError(
                f"timestep_type {scheduler.config.timestep_type!r} counts steps, as pipelines of diffusers do, whose "
                f"networks are told no time: DiscreteScoreScheduler.from_config(scheduler.config, timestep_type='time')"
            )
        if not hasattr(network, "config"):
            raise ValueError(
                f"a ScoreSDETextPipeline needs a network with a config, such as a DiTModel, not a "
                f"{type(network).__name__}: pass it as transformer"
            )
        if network.config.get("vocab_size") is None:
            raise ValueError(
                f"this {type(network).__name__} is of numbers, not of tokens (it has no vocab_size): use it in a "
                f"ScoreSDEPipeline"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"a ScoreSDETextPipeline needs a fast tokenizer of transformers, such as a PreTrainedTokenizerFast, "
                f"not a {type(tokenizer).__name__}"
            )
        sizes = {
            f"the {type(scheduler).__name__}": scheduler.config.vocab_size,
            f"the {type(network).__name__}": network.config["vocab_size"],
            f"the {type(tokenizer).__name__}": len(tokenizer),
        }
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} has {size} tokens" for name, size in sizes.items())
            raise ValueError(f"{found}: use the scheduler and the tokenizer that the network was trained with")

    @property
    def denoiser(self) -> Network:
        """The network."""
        return self.transformer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without the mask."""
        return self.scheduler.config.vocab_size

    @property
    def length(self) -> int:
        """Number of tokens of the sequences that the network was trained on."""
        size = self.transformer.config["sample_size"]
        return size if isinstance(size, int) else size[0]

    @property
    def tells_time(self) -> bool:
        """Whether the network is told the time, so that its output changes although no token did."""
        return self.transformer.config.get("time_conditioning", True)

    def decode(self, token_ids) -> list[str]:
        """Texts of sequences of token ids (B, L), each up to its end mark; masks are shown as a grey box. Where a
        callback decodes the first B of its call, up to the first end mark that nothing in the prompt follows.

        Raises ValueError for what are no such ids.
        """
        check_token_ids(token_ids, self.vocab_size + (self.scheduler.mask_token_id is not None))
        last = self._last_stated
        if last is not None and len(last) > 1:
            last = last[: len(token_ids)]
        return decode_texts(self.tokenizer, token_ids, last)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        class_labels=None,
        length: int | None = None,
        block_length: int | None = None,
        generator: Generators = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("token_ids",),
        gap: str = GAP,
        complete: bool = False,
    ):
        """Generate text.

        Args:
            batch_size: number of texts; by default as many as prompts or labels are given. A single one is for all.
            prompt: what is known of the text, or of each: its beginning, which is continued; with `gap` in it once for
                every token that shall be filled in, such as "To " + 5 * "[MASK]" + " not to be". It stays as it is.
            num_inference_steps: steps of the scheduler, of each block.
            temperature, top_k, top_p: of the distribution of the clean tokens: see `DiscreteScoreScheduler.step`.
                None for the scheduler's temperature, and for no limit. A scheduler with a final_temperature has a
                temperature for each step, and takes no other.
            guidance_scale: w of classifier-free guidance: log p = (1 - w) log p(without a class) + w log p(of the
                class), normed (Schiff et al. 2025), of what the scheduler's process makes each token next: see
                `DiscreteScoreScheduler.step`; 1 is none.
            class_labels: a label or class name, or one per text, as a list, tensor or array; None for no class.
            length: number of tokens of each text, with the prompt; by default the model's. More than that needs a
                block_length.
            block_length: generate so many tokens at once, one block after the other. Each sees as many tokens before it
                as fit into the model's length, and of absorbing noise masks behind it.
            generator: source of all draws; with a list of one per text, a text depends on its own seed only.
            output_type: text, or pt: token ids alone.
            return_dict: return a `ScoreSDETextPipelineOutput` instead of a tuple of the texts, or of the token ids.
            callback_on_step_end: called as f(pipeline, step, timestep, {"token_ids": (B, length)}) after every step,
                such as `show_text`; a dict that it returns may replace what it was given. As of `ScoreSDEPipeline`.
            callback_on_step_end_tensor_inputs: what it is given: "token_ids", and "class_labels", what the network is
                told (2, B), without a class first.
            gap: what stands in prompts for a token to be filled in.
            complete: prompts are whole texts but for their gaps: behind them stands the end mark.

        Returns:
            `.texts`, `.token_ids` and `.nfe`. A block ends before its last step where nothing can change any more, and
            sampling before the last block where all texts have ended.

        Raises ValueError for arguments that don't fit the model, before any work.
        """
        self._interrupt = False
        call = self._for_one_call()
        call.check_components()
        check_choice("output_type", output_type, OUTPUT_TYPES)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is not None and not is_texts(prompts):
            raise ValueError(f"a prompt is a text, or a list of texts, not {quoted(prompt)}")
        labels = call.prepare_labels(class_labels, batch_size)
        if batch_size is None:
            batch_size = next((len(each) for each in (prompts, labels) if each is not None and len(each) > 1), 1)
            labels = call.prepare_labels(class_labels, batch_size)
        conditions = call.prepare_guidance(guidance_scale, labels, batch_size)
        names = call.callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        call.check_call(batch_size, generator, names, conditions)
        length, block_length = call.check_lengths(length, block_length)
        call.scheduler.check_limits(temperature, top_k, top_p, guidance_scale)

        last_one = call.scheduler.config.final_temperature
        if temperature is not None and last_one is not None:
            raise ValueError(
                f"temperature {temperature} would have no effect: the scheduler's falls to its final_temperature "
                f"{last_one}; leave it out, or use DiscreteScoreScheduler.from_config(pipe.scheduler.config, "
                f"final_temperature=None)"
            )

        if complete and prompts is None:
            raise ValueError("complete=True is of prompts: pass one, with gaps to be filled in")
        if prompts is not None and len(prompts) not in (1, batch_size):
            raise ValueError(f"{len(prompts)} prompts were given for {batch_size} texts: give one, or one for each")
        encoded = prompts and encode_prompts(call.tokenizer, prompts, gap, length, complete)

        device, last = call._execution_device, None
        tokens = call.scheduler.init_noise((batch_size, length), generator, device)
        given = torch.zeros_like(tokens, dtype=torch.bool)
        if encoded:
            known, given, last = encoded
            known, given = known.to(device), given.to(device).expand(batch_size, -1)
            tokens = torch.where(given, known, tokens)
        call._last_stated = last

        limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        tokens, evaluated = call.sample_in_blocks(
            tokens, ~given, last, num_inference_steps, block_length, generator, limits, callback_on_step_end, names
        )
        call._end_call()
        lengths = lengths_of_texts(call.tokenizer, tokens, last)
        _, pad = end_ids(call.tokenizer)
        if pad is not None:
            behind = (torch.arange(length) > lengths[:, None]).to(device)
            tokens = torch.where(behind, pad, tokens)
        self.maybe_free_model_hooks()
        texts = decode_texts(call.tokenizer, tokens, last) if output_type == "text" else None
        if not return_dict:
            return (tokens if texts is None else texts,)
        nfe = int(evaluated.any(1).sum())
        return ScoreSDETextPipelineOutput(texts=texts, token_ids=tokens, nfe=nfe, nfe_of_each=evaluated.sum(0))

    def prepare_guidance(self, guidance_scale, labels, batch_size) -> Conditions:
        """What the network is told, {name: (B, ...)}, of which this call then knows what guidance leads away from, too.

        Raises ValueError for guidance that the network can't follow.
        """
        check_finite("guidance_scale", guidance_scale)
        own: Conditions = {}
        if labels is not None:
            own = {"class_labels": torch.tensor(labels, device=self._execution_device)}
        null = null_conditions(self.transformer, own)
        if guidance_scale != 1 and not null:
            raise ValueError(
                f"guidance_scale {guidance_scale} needs class_labels and a network with a null label: pass 1"
                if labels is None or self.num_classes is None
                else f"guidance_scale {guidance_scale}: this network was never trained without a class; pass 1"
            )
        rows = [null, own] if null else [own]
        self._guidance_scale = guidance_scale
        self._conditions = {name: torch.stack([row[name] for row in rows]) for name in own}
        return own

    def check_lengths(self, length, block_length):
        """(length, block_length), by default the model's, and all at once. Raises ValueError for those that are no
        whole numbers from 1 on, or that don't fit the model."""
        for name, value in (("length", length), ("block_length", block_length)):
            if value is not None:
                check_count(name, value)
        length = self.length if length is None else length
        most = self.length - 1 if length > self.length else self.length
        if block_length is None and length > self.length:
            raise ValueError(
                f"length {length} is more than the {self.length} tokens that the model was trained on: pass a "
                f"block_length, such as {max(1, self.length // 2)}, to generate it in blocks"
            )
        if block_length is not None and block_length > most:
            raise ValueError(
                f"block_length {block_length} must be at most {most}: a block and what it sees before it fit into the "
                f"{self.length} tokens that the model was trained on"
            )
        return length, block_length or length

    def blocks(self, free, block_length):
        """[(number of the block, first of the tokens that the network sees, the place behind the last, which of these
        may change (B, L), the place behind the block)] of the blocks in which there is something free, (B, length)."""
        length, blocks = free.shape[1], []
        for number, begin in enumerate(range(0, length, block_length)):
            end = min(begin + block_length, length)
            first = max(0, end - self.length)
            last = end
            if self.scheduler.mask_token_id is not None:
                # masks say that nothing is known, as in training
                last = min(length, first + self.length)
            inside = torch.zeros_like(free)
            inside[:, begin:end] = free[:, begin:end]
            if inside.any():
                blocks.append((number, first, last, inside[:, first:last], end))
        return blocks

    def sample_in_blocks(
        self, tokens, free, last, num_inference_steps, block_length, generator, limits, callback=None, names=()
    ):
        """Carry the free tokens of sequences (B, length) from noise to clean ones, block by block.

        Args:
            free: (B, length), True where a token is to be found.
            last: where the last known token of each stands, as `encode_prompts` has it.
            limits: temperature, top_k and top_p of the scheduler's `step`.
            callback, names: callback_on_step_end and its tensor inputs.

        Returns the tokens, and which sequences were evaluated in each step (steps, B).
        """
        scheduler, blocks, evaluated, step = self.scheduler, self.blocks(free, block_length), [], 0
        scheduler.set_timesteps(num_inference_steps, device=tokens.device)
        self._num_timesteps = len(blocks) * scheduler.nfe
        generators = generators_of_blocks(generator, -(-free.shape[1] // block_length))
        ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        with self.progress_bar(total=self._num_timesteps) as bar:
            for number, first, behind, inside, end in blocks:
                scheduler.set_timesteps(num_inference_steps, device=tokens.device)
                network = Evaluations(self, tokens[:, first:behind])
                for timestep in scheduler.timesteps:
                    part, inside = tokens[:, first:behind], inside & ~ended
                    settled = scheduler.finished(part, inside)
                    evaluation = None if self.interrupt else network(part, timestep, settled)
                    if evaluation is None:
                        break
                    output, stale = evaluation
                    evaluated.append(stale)
                    guides = {}
                    if len(output) == 2:
                        guides = {"origin_output": output[1], "guidance_scale": self._guidance_scale}
                    part = scheduler.step(
                        output[0], timestep, part, generators[number], free_mask=inside, **guides, **limits
                    ).prev_sample
                    tokens = torch.cat([tokens[:, :first], part, tokens[:, behind:]], dim=1)
                    bar.update()
                    if callback is not None:
                        before, tokens = tokens, self.call_back(callback, names, step, timestep, tokens)
                        check_returned(tokens, before, scheduler.path.num_states)
                    step += 1
                ended = (lengths_of_texts(self.tokenizer, tokens, last) < end).to(tokens.device)[:, None]
                if self.interrupt or bool(ended.all()):
                    break
        never = torch.zeros(0, len(tokens), dtype=torch.bool, device=tokens.device)
        return tokens, torch.stack(evaluated) if evaluated else never

    def evaluate(self, tokens, timesteps, rows=None):
        """The network's output, float32, for tokens (B, L) and timesteps (B,), or for those of them that `rows`
        numbers: (1, B, L, V); of what guidance leads to and away from, in this order, (2, B, L, V)."""
        conditions = self._conditions
        if rows is not None:
            tokens, timesteps = tokens[rows], timesteps[rows]
            conditions = {name: value[:, rows] for name, value in conditions.items()}
        told = SimpleNamespace(_guidance_scale=self._guidance_scale, _conditions=conditions, _timestep_to=None)
        networks = (self.transformer, self.transformer)
        return torch.stack([each for each in sides(told, networks, tokens, timesteps) if each is not None])

    @torch.no_grad()
    def log_likelihood(
        self,
        texts: str | list[str] | None = None,
        num_samples: int = 8,
        generator: torch.Generator | None = None,
        class_labels=None,
        token_ids: torch.Tensor | None = None,
        filled: bool = False,
        batch_size: int = 32,
    ) -> TextLikelihood:
        """An upper bound on -log p of texts, which the scheduler's process and the network state (Sahoo et al. 2024;
        Lou et al. 2024; Schiff et al. 2025): estimated without bias, by draws of times and noise.

        A text of more tokens than the model's length is taken apart into sequences of that length, which know nothing
        of each other; of the last, which ends with the text, those tokens are given that were counted before. A shorter
        one is a sequence of its own length, as it stands in a longer text.

        Args:
            texts: a text, or a list of texts; or
            token_ids: sequences of token ids (T, L), such as rows of training data.
            num_samples: times for each sequence, one in each of as many equal parts; with 1 there is no standard error.
            generator: source of all draws.
            class_labels: a label or name, or one per text, for the likelihood given the class; by default without.
            filled: texts are whole, as a model of texts of their own, such as molecules, is trained on: with the end
                mark, and filled up behind it.
            batch_size: number of sequences that the network sees at once.

        Returns a `TextLikelihood`: `.bits_per_token()`, `.bits_per_character()` and their standard errors.

        Raises ValueError for empty texts, characters that the tokenizer lacks, and token ids out of range.
        """
        call = self._for_one_call()
        call.check_components()
        if (texts is None) == (token_ids is None):
            raise ValueError("pass either texts or token_ids")
        if token_ids is None:
            texts = [texts] if isinstance(texts, str) else texts
            if not is_texts(texts):
                raise ValueError(f"texts must be a text or a list of texts, not {quoted(texts)}")
            count = len(texts)
        else:
            check_token_ids(token_ids, call.vocab_size)
            if filled:
                raise ValueError("filled=True is of texts: token_ids are sequences as they are")
            count = len(token_ids)
        labels = call.prepare_labels(class_labels, count)
        conditions = call.prepare_guidance(1.0, labels, count)
        device = call._execution_device

        def bound(tokens, given, u, generators, numbers):
            told = {name: value[numbers] for name, value in conditions.items()}

            def network(x_t, timesteps):
                return run("with a class", call.transformer, told, x_t, timesteps, call)

            return call.scheduler.likelihood_bound(network, tokens.to(device), u, generators, given.to(device))

        found = text_likelihood(
            bound, call.tokenizer, texts, token_ids, call.length, filled, num_samples, batch_size, generator
        )
        self.maybe_free_model_hooks()
        return found


def generators_of_blocks(generator, count):
    """The generator of each of `count` blocks: one for all; of a list of one per text new ones, seeded by it, so that
    a text doesn't depend on how many draws others need."""
    if not isinstance(generator, list) or count == 1:
        return [generator] * count
    seeds = [torch.randint(2**62, (count,), generator=each, device=each.device).tolist() for each in generator]
    return [
        [torch.Generator(each.device).manual_seed(own[number]) for each, own in zip(generator, seeds, strict=True)]
        for number in range(count)
    ]


def is_texts(texts) -> TypeGuard[Sequence[str]]:
    """Whether these are one text or more, in a list."""
    return isinstance(texts, (list, tuple)) and bool(texts) and all(isinstance(each, str) for each in texts)


def check_token_ids(token_ids, vocab_size):
    """Raise ValueError for what are no token ids (T, L) of a vocabulary."""
    if not torch.is_tensor(token_ids) or token_ids.ndim != 2 or token_ids.dtype != torch.int64 or not token_ids.numel():
        kind = f"{token_ids.dtype} {tuple(token_ids.shape)}" if torch.is_tensor(token_ids) else quoted(token_ids)
        raise ValueError(f"token_ids must be a tensor (texts, length), int64, not {kind}")
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token_ids from {low} to {high} are out of range: this model has ids 0 to {vocab_size - 1}")


def check_returned(tokens, before, states):
    """Raise ValueError unless tokens that a callback returned can take the place of those before."""
    if tokens is before:
        return
    check_token_ids(tokens, states)
    if tokens.shape != before.shape:
        raise ValueError(
            f"callback_on_step_end returned token_ids of shape {tuple(tokens.shape)}: return as many as it was given, "
            f"{tuple(before.shape)}"
        )


def check_names(id2label):
    """Raise ValueError for what is no {label: class name}."""
    is_of_names = isinstance(id2label, dict) and all(re.fullmatch("[0-9]+", str(label)) for label in id2label)
    if id2label and not is_of_names:
        raise ValueError(
            f"id2label {quoted(id2label)} must be {{label: class name}} with labels from 0 on, such as "
            f"{{0: 'prose', 1: 'verse'}}"
        )


def show_text(pipeline, step, timestep, tensors):
    """A callback_on_step_end that shows the first text in one line of the terminal, as it forms."""
    width = shutil.get_terminal_size().columns - 1
    line = f"{step + 1}/{pipeline.num_timesteps} {one_line(pipeline.decode(tensors['token_ids'][:1])[0])}"
    print(f"\r{line[:width]:<{width}}", end="" if step + 1 < pipeline.num_timesteps else "\n", flush=True)
