"""Tokenizers made from the data: bytes, the characters that occur, or byte pairs. What they make of a text is the text
again when it is decoded, whatever stands in it."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from score_sde.pipelines.wording import check_choice, quoted


TOKENIZERS = ("bytes", "characters", "bpe")
# ends a text, and fills up behind it
END = "<end>"
# different characters that a vocabulary of them may have, unless a size says otherwise
MOST_CHARACTERS = 1000


def make_tokenizer(kind, texts=(), vocab_size=None, end_mark=False):
    """A fast tokenizer of `transformers` whose tokens are those of texts, and no more: it adds nothing to a text, and
    what stands in a text is never taken for the end mark.

    Args:
        kind: one of `TOKENIZERS`: the 256 bytes of UTF-8; the characters of the texts, in the order of their code
            points; or byte pairs that are learned from the texts.
        texts: an iterable of str. Bytes need none.
        vocab_size: number of tokens, of "bpe" alone; with "characters" the most that are allowed, 1000 unless given.
        end_mark: whether the last token is one that ends a text, and pads.

    Raises ValueError for a kind that is unknown, texts that are empty, more characters than are allowed, and byte
    pairs that there are too few texts for.
    """
    check_choice("tokenizer", kind, TOKENIZERS)
    if kind == "bytes" and vocab_size is not None:
        raise ValueError(f"vocab_size {vocab_size}: a tokenizer of bytes has 256 tokens; leave it out")
    if kind == "bpe" and (vocab_size is None or vocab_size < 257 + end_mark):
        raise ValueError(
            f"vocab_size {vocab_size}: a tokenizer of byte pairs needs the number of its tokens, at least "
            f"{257 + end_mark}: the bytes{', the end mark' * end_mark} and a pair"
        )
    rules = {"bytes": _bytes, "characters": _characters, "bpe": _pairs}[kind](texts, vocab_size, end_mark)
    special = {"eos_token": END, "pad_token": END} if end_mark else {}
    # an end mark that is spelled out in a text is its characters
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, split_special_tokens=True, clean_up_tokenization_spaces=False, **special
    )


def _bytes(texts=(), vocab_size=None, end_mark=False):
    rules = Tokenizer(models.BPE(dict(_byte_tokens()), []))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules.decoder = decoders.ByteLevel()
    return rules


def _byte_tokens():
    """(token, number) of the 256 bytes, a byte's number being its value: `ByteLevel` writes those of visible Latin-1
    as themselves and the others, in their order, as the characters from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    written = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [(written[byte], byte) for byte in range(256)]


def _characters(texts, vocab_size, end_mark):
    found, most = set(), (MOST_CHARACTERS if vocab_size is None else vocab_size) - end_mark
    for text in texts:
        found.update(text)
    if not found:
        raise ValueError("there is no text to make a tokenizer of: all are empty")
    if len(found) > most:
        rarest, size = quoted("".join(sorted(found)[-10:])), len(found) + end_mark
        raise ValueError(
            f"the texts hold {len(found):,} different characters, more than {most:,} (the last are {rarest}): take "
            f"bytes or bpe, or a folder made by `score-sde tokenizer characters ... --vocab_size {size}`"
        )
    rules = Tokenizer(models.WordLevel({character: number for number, character in enumerate(sorted(found))}))
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    rules.decoder = decoders.Fuse()
    return rules


def _pairs(texts, vocab_size, end_mark):
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - end_mark,
        initial_alphabet=[token for token, _ in _byte_tokens()],
        min_frequency=2,
        show_progress=False,
    )
    rules.train_from_iterator(texts, trainer)
    if rules.get_vocab_size() < vocab_size - end_mark:
        raise ValueError(
            f"vocab_size {vocab_size}: the texts hold pairs for {rules.get_vocab_size() + end_mark} tokens alone: take "
            f"fewer, or more text"
        )
    return rules
