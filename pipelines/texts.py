"""Between texts and the tokens that a network sees: prompts with gaps, ends of texts, and what is shown of masks."""

import torch

from .wording import few, quoted


# what stands for a token to be filled in
GAP = "[MASK]"
# what is shown of a token that is not known yet
HIDDEN = "\u2591"


def lacking_characters(tokenizer, texts):
    """The characters of texts that a tokenizer has no token for, and would leave out. Those that its unknown token may
    stand for are of `unknown_parts`."""

    def is_known(character):
        try:
            ids = tokenizer(character, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception:  # what `tokenizers` raises of a vocabulary without an unknown token
            return False
        return bool(ids) or character.isspace()

    return [each for each in sorted(set().union(*map(set, texts))) if not is_known(each)]


def unknown_parts(tokenizer, texts):
    """The parts of texts, words or characters, that a tokenizer makes its unknown token of; [] where it has none."""
    found = set()
    for text in texts if tokenizer.unk_token_id is not None else ():
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = zip(made["input_ids"], made["offset_mapping"], strict=True)
        found |= {text[begin:end] for number, (begin, end) in places if number == tokenizer.unk_token_id}
    return sorted(found)


def encode_texts(tokenizer, texts):
    """Token ids of texts, a list for each, without any that the tokenizer would add. Raises ValueError for characters
    and words that it lacks, naming them."""
    if lacking := lacking_characters(tokenizer, texts) or unknown_parts(tokenizer, texts):
        raise ValueError(f"the tokenizer has no token for {few(map(repr, lacking), 10)}: leave them out")
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def encode_prompts(tokenizer, prompts, gap, length, complete=False):
    """Prompts as (tokens (B, length), given (B, length), last (B,)): what is known, which places that is, and the place
    of the last token that a prompt states, -1 of none. Places that are not known hold 0.

    Args:
        prompts: texts.
        gap: what in them stands for one token to be filled in.
        complete: whether they are whole texts, behind which the end mark stands and fills up to the length.

    Raises ValueError for prompts that are empty, longer than the length, or leave nothing to fill in, for characters
    that the tokenizer lacks, and where it has no end mark for those that are complete.
    """
    if not isinstance(gap, str) or not gap:
        raise ValueError(f"gap {gap!r} must be a text, and not empty: it stands for a token to be filled in")
    if complete and tokenizer.eos_token_id is None:
        raise ValueError("complete=True needs an end mark, and this tokenizer has none (no eos_token)")
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    given, last = torch.zeros_like(tokens, dtype=torch.bool), torch.full((len(prompts),), -1)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError("a prompt is empty: leave prompt out to begin from nothing")
        pieces = encode_texts(tokenizer, prompt.split(gap))
        ids = pieces[0]
        for piece in pieces[1:]:
            ids = [*ids, None, *piece]
        places = [place for place, number in enumerate(ids) if number is not None]
        last[row] = max(places, default=-1)
        if complete:
            ids = filled_up(ids, length, tokenizer)
        if len(ids) > length:
            raise ValueError(
                f"prompt {quoted(prompt)} has {len(ids)} tokens, more than the length {length}: shorten it, or pass a "
                f"greater length, beyond the model's with block_length"
            )
        if len(ids) == length and None not in ids:
            full = f"fills all of the length {length}"
            if complete:
                full = "leaves nothing to fill in, as complete=True ends it there"
            raise ValueError(
                f"prompt {quoted(prompt)} {full}: write {gap} where a token shall be filled in"
                f"{'' if complete else ', or pass a greater length'}"
            )
        for place, number in enumerate(ids):
            if number is not None:
                tokens[row, place], given[row, place] = number, True
    return tokens, given, last


def end_ids(tokenizer):
    """(end mark, what fills up behind it) of a tokenizer; None for one without an end mark."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return end, end if pad is None else pad


def filled_up(ids, length, tokenizer):
    """Token ids, a list, as a sequence of at least this length: the end mark behind them, and what fills up."""
    end, pad = end_ids(tokenizer)
    return [*ids, *[end, *[pad] * length][: max(length - len(ids), 0)]]


def lengths_of_texts(tokenizer, tokens, last=None):
    """How many tokens of sequences (B, L) belong to the text: all before the first end mark that nothing stated follows
    (`last`, of `encode_prompts`). (B,), L where there is none."""
    end, length = tokenizer.eos_token_id, tokens.shape[1]
    if end is None:
        return torch.full((len(tokens),), length)
    places, tokens = torch.arange(length), tokens.cpu()
    is_end = tokens == end
    if last is not None:
        is_end &= places >= last[:, None]
    return torch.where(is_end, places, length).amin(1)


def decode_texts(tokenizer, tokens, last=None):
    """The texts of sequences of token ids (B, L), each up to its end mark; `last` as of `lengths_of_texts`."""
    pairs = zip(tokens.tolist(), lengths_of_texts(tokenizer, tokens, last).tolist(), strict=True)
    return [decode(tokenizer, ids[:length]) for ids, length in pairs]


def decode(tokenizer, ids, hidden=HIDDEN):
    """The text of token ids, a list; of what is no token, the mask, `hidden`."""
    text, run = "", []
    for number in [*ids, None]:
        if number is not None and number < len(tokenizer):
            run.append(number)
            continue
        text += tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False) if run else ""
        text, run = text + ("" if number is None else hidden), []
    return text
