"""Make a tokenizer from texts: a folder that transformers opens, and `score-sde train --data_kind text --tokenizer`.

    score-sde tokenizer characters molecules.parquet runs/tokenizer --text_column smiles
    score-sde tokenizer bpe "books/*.txt" runs/tokenizer --vocab_size 4096

`characters` has those that occur in the texts, `bytes` the 256 of UTF-8, `bpe` byte pairs learned from the texts.
Whatever stands in a text comes back when its tokens are decoded.
"""

import argparse
import os
import sys

from score_sde.pipelines.writing import whole_folder
from score_sde.training.parts.options import OneLineParser
from score_sde.training.parts.text_data import TextDataConfig, Texts
from score_sde.training.parts.tokenizers import END, TOKENIZERS, make_tokenizer


def write_tokenizer(kind, dataset, output, split="train", text_column="text", lines=False, vocab_size=None, end=True):
    """Make a tokenizer of `make_tokenizer` from a dataset as training reads it, and write its folder; return one line
    that says what it is.

    Raises ValueError as `make_tokenizer` and `Texts` do, and for a folder that exists.
    """
    if os.path.isfile(output) or (os.path.isdir(output) and os.listdir(output)):
        raise ValueError(f"folder {output!r} exists: choose another, or remove it")
    texts = Texts(TextDataConfig(dataset=dataset, split=split, text_column=text_column, packing=not lines))
    tokenizer = make_tokenizer(kind, texts, vocab_size, end)
    with whole_folder(output) as partial:
        tokenizer.save_pretrained(partial)
    return (
        f"{len(tokenizer):,} tokens, {END if end else 'no end mark'}, of {len(texts):,} texts with "
        f"{texts.characters:,} characters: {output}"
    )


def main(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TOKENIZERS, help="what the tokens are")
    parser.add_argument("dataset", help="a .txt, .jsonl or .parquet file, a pattern, a folder, or an id on the Hub")
    parser.add_argument("output", help="the folder that is written; it must not exist, or be empty")
    parser.add_argument("--vocab_size", type=int, help="tokens of bpe; of characters the most that are allowed, 1000")
    parser.add_argument("--split", default="train", help="of the dataset; train unless given")
    parser.add_argument("--text_column", default="text", help="column that holds the texts; text unless given")
    parser.add_argument("--lines", action="store_true", help="each line of a .txt file is a text, not the file")
    parser.add_argument("--no_end", dest="end", action="store_false", help=f"without the end mark, {END}")
    try:
        print(write_tokenizer(**vars(parser.parse_args(argv))))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
