"""Tokenizers: those of checkpoints, read without running the checkpoint's own code, and a small one made here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import cached_file

from vessel.errors import VesselError
from vessel.hub import HubName, hub_hint, is_hub_name

_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # of a repository: those that a tokenizer may be made of


class InternLM2Tokenizer(SentencePieceBackend):
    """The tokenizer of InternLM2 folders: a SentencePiece model with added tokens.

    `sentencepiece` itself cuts the text between added tokens; bytes that are no piece fall back to byte tokens.

    Args:
        vocab_file: the `tokenizer.model` of the folder.
        bos_token, eos_token, unk_token, pad_token: as InternLM2 has them where the folder does not state them.
        add_bos_token: whether a text begins with the first of them.
        kwargs: the other entries of the folder's `tokenizer_config.json`.
    """

    def __init__(
        self,
        vocab_file: str,
        *,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        pad_token: str = "</s>",
        add_bos_token: bool = True,
        **kwargs: Any,
    ) -> None:
        self.add_bos_token = add_bos_token
        if kwargs.get("sp_model_kwargs") is None:  # public folders hold a null
            kwargs["sp_model_kwargs"] = {}
        special = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        super().__init__(vocab_file=vocab_file, add_bos_token=add_bos_token, **special, **kwargs)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put the first token before a text."""
        first = [self.bos_token_id] if self.add_bos_token else []
        return [*first, *token_ids_0, *(token_ids_1 or [])]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write the folder, with `add_bos_token`, which transformers leaves out."""
        files: tuple[str, ...] = super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory) / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"add_bos_token": self.add_bos_token}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; byte tokens become the characters they spell."""
        return str(self.sp_model.decode(tokens))


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint.

    Args:
        source: a folder, or `hf://owner/name[@revision]`.

    Raises:
        VesselError: the source holds no tokenizer that can be read.
    """
    if is_hub_name(source):
        source = str(HubName.parse(source).download(patterns=_FILES)[0])
    elif not Path(source).is_dir():
        raise VesselError(f"prompt.tokenizer={source}: no such folder{hub_hint(source)}")
    # AutoTokenizer would run the checkpoint's own code; the class named in the folder is one of transformers', or
    # stands for one.
    try:
        name = get_tokenizer_config(source).get("tokenizer_class", "PreTrainedTokenizerFast")
        cls: Any = getattr(transformers, name, None) or getattr(transformers, f"{name}Fast", None)
        if cls is None:
            cls = PreTrainedTokenizerFast if _holds(source, "tokenizer.json") else InternLM2Tokenizer
        return cls.from_pretrained(source)
    except (OSError, json.JSONDecodeError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise VesselError(
            f"prompt.tokenizer={source}: no tokenizer can be read from it ({error}); copy its files again, or "
            "choose prompt=small for weights that vessel made with its small one"
        ) from error


def _holds(source: str, file: str) -> bool:
    return cached_file(source, file, _raise_exceptions_for_missing_entries=False) is not None


def small_tokenizer(special: list[str], texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few texts: it encodes any text, and these in few tokens.

    Args:
        special: tokens that stand for themselves; `<|endoftext|>` and `<|im_end|>` among them.
        texts: to train on.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
