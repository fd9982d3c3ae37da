"""Words as conditions: an encoder of `transformers` and its tokenizer turn texts into what a network is told of them,
the same in training and in sampling.

An empty text is no text: what stands for none in `null_conditions` of our networks.
"""

import hashlib
import json
import os

import torch

from .wording import quoted, shortened


# how texts are encoded, as a pipeline's config has it, where it doesn't say
PROMPT_SETTINGS = {
    # a text is cut off, or padded, to so many
    "max_tokens": 77,
    # hidden states of the encoder, one behind the other; -1 is its output
    "layers": [-1],
    # whether the network is also told the mean of the tokens' vectors
    "pooled": False,
    # id on the Hub of an encoder that is no part of the bundle, and what tells it from others
    "text_encoder": None,
    "fingerprint": None,
}


def check_prompt_settings(settings):
    """Raise ValueError for what are no settings of `PROMPT_SETTINGS`."""
    for name, value in settings.items():
        if name not in PROMPT_SETTINGS:
            raise ValueError(
                f"prompt_settings: {quoted(name)} is unknown; the settings are {', '.join(PROMPT_SETTINGS)}"
            )
        texts = name in ("text_encoder", "fingerprint")
        fits = {
            "max_tokens": isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10_000,
            "layers": isinstance(value, (list, tuple)) and 1 <= len(value) <= 100 and {*map(type, value)} == {int},
            "pooled": isinstance(value, bool),
        }.get(name, value is None or (isinstance(value, str) and len(value) <= 200))
        if not fits:
            wanted = {
                "max_tokens": "a whole number from 1 to 10,000",
                "layers": "a list of whole numbers",
                "pooled": "true or false",
            }
            raise ValueError(
                f"prompt_settings: {name} {quoted(value)} must be {'a short text' if texts else wanted[name]}"
            )


def open_text_encoder(folder_or_repo, **download):
    """(text encoder, tokenizer) from a folder or a repo on the Hub, for inference in float32; of the folder of a
    pipeline its own. Of an encoder and decoder that `transformers` can open alone, such as T5's, the encoder; of CLIP
    the part that reads.

    Takes `revision`, `token` and the other arguments of a download. No code of the repo is run, and weights are opened
    as safetensors only. Raises ValueError for what is none.
    """
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    except ImportError as error:
        raise ValueError(f"prompts need the package transformers, pip install transformers: {error}") from error
    safe = {"trust_remote_code": False} | download
    in_pipeline = os.path.lexists(os.path.join(folder_or_repo, "model_index.json"))
    of_encoder, of_tokenizer = ({"subfolder": name} if in_pipeline else {} for name in ("text_encoder", "tokenizer"))
    try:
        config = transformers.AutoConfig.from_pretrained(folder_or_repo, **safe, **of_encoder)
        encoder_class = transformers.AutoModel
        if config.model_type == "clip":
            encoder_class = transformers.CLIPTextModel
        elif config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
            encoder_class = transformers.AutoModelForTextEncoding
        # by the library's own attention, whatever the config says
        text_encoder = encoder_class.from_pretrained(
            folder_or_repo,
            **safe,
            **of_encoder,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder_or_repo, **safe, **of_tokenizer)
    except Exception as error:  # the library has no common class of errors
        raise ValueError(
            f"text encoder {quoted(folder_or_repo)} cannot be opened: {shortened(error)}. Give a folder, or the id of "
            f"a repo on the Hub, with an encoder of transformers (config.json, safetensors) and its tokenizer"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"text encoder {quoted(folder_or_repo)}: its tokenizer, a {type(tokenizer).__name__}, has no "
            f"tokenizer.json: save it as a fast tokenizer"
        )
    if tokenizer.pad_token is None:
        # masked, whatever it is
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(f"text encoder {quoted(folder_or_repo)}: its tokenizer has no token to fill up with: set one")
    return text_encoder.eval().requires_grad_(False), tokenizer


def fingerprint(text_encoder, tokenizer):
    """A hash of the weights of a text encoder, as they are held, and of what its tokenizer does: it tells one from
    another of the same name."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # of the last call
    rules.pop("truncation", None), rules.pop("padding", None)
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    for name, tensor in sorted(text_encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def encoder_width(text_encoder, settings):
    """Width of what is made of texts. Raises ValueError for more tokens than the encoder has positions for, and layers
    that it doesn't have."""
    config = text_encoder.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and settings["max_tokens"] > most:
        raise ValueError(
            f"{settings['max_tokens']} tokens of a text (max_tokens) are more than the {most} that its encoder, a "
            f"{type(text_encoder).__name__}, takes: at most {most}"
        )
    layers = config.num_hidden_layers + 1
    for layer in settings["layers"]:
        if not -layers <= layer < layers:
            raise ValueError(
                f"layer {layer} of the text encoder, a {type(text_encoder).__name__}, is not among its {-layers} to "
                f"{layers - 1}"
            )
    return config.hidden_size * len(settings["layers"])


def tokenize(tokenizer, texts, max_tokens):
    """Texts as numbers (B, max_tokens) and which of them count, bool (B, max_tokens): none of an empty text."""
    found = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=max_tokens,
        padding_side="right",
        return_tensors="pt",
    )
    written = torch.tensor([bool(text.strip()) for text in texts])
    return found.input_ids, found.attention_mask.bool() & written[:, None]


def lengths(tokenizer, texts):
    """Number of tokens of each text, before it is cut off."""
    return [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids] if len(texts) else []


@torch.no_grad()
def encode(text_encoder, ids, mask, settings):
    """What a network is told of texts, float32: {"encoder_hidden_states": (B, S, width), "encoder_attention_mask":
    (B, S) bool} and with the setting pooled "pooled_projections" (B, width), the mean of the vectors that count.

    Args:
        ids, mask: as `tokenize` returns them.
        settings: those of `PROMPT_SETTINGS`.
    """
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    empty = ~mask.any(1, keepdim=True)
    # an encoder needs something to read
    shown = mask | (empty & first)
    encoder = text_encoder.get_encoder() if text_encoder.config.is_encoder_decoder else text_encoder
    layers = settings["layers"]
    output = encoder(input_ids=ids, attention_mask=shown.long(), output_hidden_states=set(layers) != {-1})
    parts = [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]
    hidden = torch.cat(parts, dim=-1).float()
    # what doesn't count may be anything, even not finite
    hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0)
    told = {"encoder_hidden_states": hidden, "encoder_attention_mask": shown}
    if settings["pooled"]:
        told["pooled_projections"] = hidden.sum(1) / shown.sum(1, keepdim=True)
    return told
