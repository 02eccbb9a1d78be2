"""Plain text to ids and back, for any Hugging Face fast tokenizer.

A tokenizer as it is loaded serves whole prompts: it reads "<|eot_id|>" in a user's words as the
control token, and SentencePiece styles put a space before the first word of every call. A dialogue
is written in segments, around control tokens that its writer places, so `TextTokenizer` works on a
copy of the tokenizer that does neither.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextToken:
    """An id and the characters [start, stop) it stands for; at least one, and tokens leave no gap."""

    id: int
    start: int
    stop: int


class TextTokenizer:
    """Encodes text in which nothing is a control token, and decodes without dropping a leading space.

    `control_ids` never come out of `encode`; `largest_id` is the largest id that can.
    Raises ValueError for a tokenizer without the fast backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} is no fast tokenizer: load one with AutoTokenizer from a folder that has "
                "tokenizer.json"
            )
        self._plain = Tokenizer.from_str(json.dumps(_without_prefix_space(json.loads(backend.to_str()))))
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
        special = {i for i, token in self._plain.get_added_tokens_decoder().items() if token.special}
        self._silent_ids: frozenset[int] = frozenset(special | ends)
        # What a vocabulary cannot spell becomes unk, which is not for us to forbid.
        self.control_ids: frozenset[int] = frozenset((special - {tokenizer.unk_token_id}) | ends)
        self.largest_id: int = max(i for i in self._plain.get_vocab().values() if i not in self.control_ids)

    def encode(self, text: str) -> list[TextToken]:
        """The tokens of one segment."""
        return _cover(self._spell(text, 0), len(text)) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens and unk are left out."""
        return self._plain.decode([i for i in ids if i not in self._silent_ids], skip_special_tokens=False)

    def _spell(self, text: str, offset: int) -> list[TextToken]:
        """Tokens of `text`, which stands at `offset`; a control token's own string is cut and spelled out."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        tokens = [
            TextToken(i, offset + a, offset + b) for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        for token in tokens:
            if token.id in self.control_ids:
                cut = token.start - offset + 1
                if cut >= len(text):
                    return [t for t in tokens if t.id not in self.control_ids]
                return self._spell(text[:cut], offset) + self._spell(text[cut:], offset + cut)
        return tokens


def _cover(tokens: list[TextToken], length: int) -> list[TextToken]:
    """The same tokens over spans without gaps, so that trimmed spaces belong to the token that carries them."""
    covering = []
    reached = 0
    for token in tokens:
        stop = max(token.stop, reached)
        start = min(token.start, reached, length - 1)
        covering.append(TextToken(token.id, start, max(stop, start + 1)))
        reached = stop
    return covering


def _without_prefix_space(tokenizer: dict) -> dict:
    """The tokenizer's JSON without the parts that add a space to the first word or take one from it."""
    tokenizer["normalizer"] = _edit(tokenizer.get("normalizer"), "normalizers", drop=("Prepend",))
    tokenizer["pre_tokenizer"] = _edit(tokenizer.get("pre_tokenizer"), "pretokenizers")
    tokenizer["decoder"] = _edit(tokenizer.get("decoder"), "decoders", drop=("Strip",))
    return tokenizer


def _edit(part: dict | None, members: str, drop: tuple[str, ...] = ()) -> dict | None:
    if part is None or part["type"] in drop:
        return None
    if part["type"] == "Sequence":
        kept = [_edit(member, members, drop) for member in part[members]]
        return {**part, members: [member for member in kept if member is not None]}
    if part["type"] == "Metaspace":
        part = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part
