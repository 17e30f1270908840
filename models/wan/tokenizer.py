"""The umT5 tokenizer: prompts in, ids and mask out."""

from __future__ import annotations

import html
import os
import pathlib
import re
from collections.abc import Sequence

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int

_END = "</s>"
_PADDING = 0
# Where a folder of weights keeps the file: itself, in Diffusers' layout, in the original's.
_PLACES = (".", "tokenizer", "google/umt5-xxl")


def clean_text(text: str) -> str:
    """Mends broken Unicode, resolves HTML entities twice and makes any white space one blank.

    Example:
      assert clean_text(" a fox &amp;amp;   a hound ") == "a fox & a hound"

    Source: the prompt cleaning of Wan and of Diffusers' `WanPipeline`.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class WanTokenizer:
    """Turns prompts into the ids that the text encoder takes.

    Args:
      tokenizer: of the `tokenizers` library; it must end texts with `</s>`.
      length: tokens of every text, its end and padding included.

    Raises:
      ValueError: the tokenizer ends texts otherwise, or `length` is below 1.

    Example:
      tokenizer = WanTokenizer.load("Wan2.1-T2V-1.3B-Diffusers/")
      tokenizer.check("a red fox in the snow")
      tokens, mask = tokenizer.encode(["a red fox in the snow", ""])
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, length: int = 512) -> None:
        if length < 1:
            raise ValueError(f"expected length >= 1, got {length}")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end = tokenizer.token_to_id(_END)
        ids = tokenizer.encode("a").ids
        if end is None or ids[-1:] != [end] or tokenizer.num_special_tokens_to_add(False) != 1:
            raise ValueError(
                f"expected a tokenizer that adds {_END} to texts and no more, got {ids}"
            )
        self.length = length
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike[str], length: int = 512) -> WanTokenizer:
        """Reads a `tokenizer.json`.

        Args:
          path: the file, its folder, or the folder of a whole model in either layout
            (`tokenizer/`, `google/umt5-xxl/`).
          length: tokens of every text.

        Raises:
          FileNotFoundError: there is none.
          ValueError: the file is damaged, or not a tokenizer of this kind.
        """
        file = _find(pathlib.Path(path))
        try:
            # the library raises bare `Exception`
            tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:
            raise ValueError(
                f"{file}: expected a tokenizer.json of the tokenizers library, got a file that it "
                f"does not read ({error})"
            ) from error
        try:
            return cls(tokenizer, length)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def count(self, prompt: str) -> int:
        """Tokens of a prompt after cleaning, its end included."""
        return len(self._tokenizer.encode(clean_text(prompt)).ids)

    def check(self, prompt: str) -> None:
        """Raises `ValueError` if `encode` would cut the prompt short."""
        if (count := self.count(prompt)) > self.length:
            raise ValueError(f"expected a prompt of at most {self.length} tokens, got {count}")

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, "batch seq"]]:
        """Returns `(ids, mask)`, both int32: cleaned, cut at the limit, ended, padded with 0.

        Args:
          prompts: texts; the empty one is the end alone.

        Raises:
          ValueError: `prompts` is one string.
        """
        if isinstance(prompts, str):
            raise ValueError("expected a list of prompts, got one string")
        ids = np.full((len(prompts), self.length), _PADDING, np.int32)
        mask = np.zeros_like(ids)
        encodings = self._tokenizer.encode_batch([clean_text(prompt) for prompt in prompts])
        for row, encoding in enumerate(encodings):
            *words, end = encoding.ids
            kept = [*words[: self.length - 1], end]
            ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = 1
        return ids, mask


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_file() and path.suffix == ".json":
        return path
    folders = [path / place for place in _PLACES]
    for folder in folders:
        if (file := folder / "tokenizer.json").is_file():
            return file
    if path.suffix == ".model" or any((folder / "spiece.model").is_file() for folder in folders):
        raise FileNotFoundError(
            f"{path}: expected tokenizer.json, got a SentencePiece model alone; put the "
            "tokenizer.json of google/umt5-xxl beside it"
        )
    places = ", ".join(f"{place}/tokenizer.json" for place in _PLACES)
    raise FileNotFoundError(f"{path}: expected one of {places} in it, got none")
