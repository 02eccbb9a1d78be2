"""VideoLLM: a causal language model that reads text and frame tokens, and the loss that teaches it when to speak.

A frame's tokens (N, D) pass a two-layer connector and take the place of N placeholder ids in the
sequence; the rest is any Hugging Face causal LM, with or without a LoRA adapter. The model predicts at
the last token of every frame whether to stay silent (the streaming EOS: separator, or eos) or to speak.
VideoLLM-online, sections 3.2 and 3.3.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from actors.adapted import AdaptedDecoder
from actors.config import ModelConfig
from actors.dialogue import IGNORED
from actors.packed import Packed

# What some LLMs do to logits after the head; here the head is called by itself.
_LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}

LOGIT_ROWS = 1024  # of the vocabulary's width that exist at once while a pack is learned


class Output(NamedTuple):
    """`logits` (B, T, V), or (K, V) where positions were chosen; `loss` a scalar, with labels only.

    A tuple, because distributed wrappers look for tensors in tuples and not in dataclasses.
    """

    logits: Tensor
    loss: Tensor | None
    past_key_values: Cache | None


class PackedLoss(NamedTuple):
    """Sums over the labels of a pack: `weighted` is what is learned; the cross-entropy of `text` and `stream` alone."""

    weighted: Tensor
    text: Tensor
    stream: Tensor


class VideoLLM(nn.Module):
    """`llm` with a connector of `vision_width` (D) inputs beside it; `frame_id` marks a frame token's place.

    `frame_shape` is (N, D). Without `frame_id` it is the first id that has no embedding.
    Raises ValueError for a `frame_id` inside the embedding table and for an LLM whose logits are not
    its head's plain output.
    """

    def __init__(
        self, llm: PreTrainedModel | PeftModel, config: ModelConfig, vision_width: int, frame_id: int | None = None
    ) -> None:
        super().__init__()
        self.llm = llm
        table, hidden = next(self.base_llm.get_input_embeddings().parameters()).shape
        if frame_id is not None and frame_id < table:
            raise ValueError(
                f"frame_id is {frame_id}, but ids below {table} have embeddings: give the Template vocab_size={table}"
            )
        for key, neutral in _LOGIT_CHANGES.items():
            if getattr(llm.config, key, None) not in (None, neutral):
                raise ValueError(f"LLM {config.llm} sets {key}, which is not supported: use an LLM with plain logits")
        self.config = config
        self.frame_id: int = table if frame_id is None else frame_id
        self.frame_shape: tuple[int, int] = (config.frames.num_tokens, vision_width)
        self.connector = nn.Sequential(nn.Linear(vision_width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.connector.to(llm.device, llm.dtype)

    @property
    def device(self) -> torch.device:
        return next(self.connector.parameters()).device

    @property
    def base_llm(self) -> PreTrainedModel:
        """The LLM without PEFT's wrapper; its layers still hold the adapter."""
        base = self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm
        assert isinstance(base, PreTrainedModel)
        return base

    def merge(self) -> None:
        """Fold the adapter into the language model and freeze everything: nothing can be trained after it."""
        if isinstance(self.llm, PeftModel):
            self.llm = self.llm.merge_and_unload()
        self.requires_grad_(False)

    def connect(self, frames: Tensor) -> Tensor:
        """Frame tokens (F, N, D) as LLM embeddings (F, N, H). Raises ValueError for another N or D."""
        if frames.ndim != 3 or tuple(frames.shape[1:]) != self.frame_shape:
            n, d = self.frame_shape
            raise ValueError(f"frame tokens have shape {list(frames.shape)}, expected [frames, {n}, {d}]")
        connected: Tensor = self.connector(frames.to(next(self.connector.parameters()).dtype))
        return connected.to(self.base_llm.dtype)

    def embed(self, input_ids: Tensor, frames: Tensor | None = None) -> Tensor:
        """Embeddings of ids (B, T) or (T,), with frame tokens (F, N, D) in order at the placeholders.

        The frames of a batch follow each other row by row. Raises ValueError unless there are exactly
        F x N placeholders: features of a wrong count are never stretched or dropped.
        """
        at_frame = torch.eq(input_ids, self.frame_id)
        embeddings: Tensor = self.llm.get_input_embeddings()(input_ids.masked_fill(at_frame, 0))
        if frames is None:
            # No frame still goes through a connector that learns: workers that share gradients wait for all of them.
            frames = torch.empty((0, *self.frame_shape), device=self.device)
        connected = self.connect(frames)
        found = int(at_frame.sum())
        if found != connected.shape[0] * connected.shape[1]:
            raise ValueError(
                f"{found} frame placeholders in the ids, but {len(frames)} frames of {self.frame_shape[0]} tokens: "
                "give every frame of the ids, and no other, in their order"
            )
        return embeddings.masked_scatter(at_frame.unsqueeze(-1), connected)

    def forward(
        self,
        input_ids: Tensor,
        frames: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        logits_at: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Output:
        """Ids (B, T) and frames (F, N, D) to logits, and to the loss where `labels` (B, T) are given.

        Logits are computed at all positions; with `logits_at` (B, T) bool only there, row by row; with
        labels only where something is learned. `denominator` is that of `streaming_loss`.
        """
        if labels is not None:
            if logits_at is not None:
                raise ValueError("labels choose the positions of the logits themselves: give labels or logits_at")
            logits_at = labels != IGNORED
        llm = self.base_llm
        hidden = llm.get_decoder()(
            inputs_embeds=self.embed(input_ids, frames),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        states = hidden.last_hidden_state
        logits = llm.get_output_embeddings()(states if logits_at is None else states[logits_at])
        loss = None
        if labels is not None:
            at_frame = torch.eq(input_ids, self.frame_id)[logits_at]
            loss = streaming_loss(logits, labels[logits_at], at_frame, self.config.stream_loss_weight, denominator)
        return Output(logits, loss, hidden.past_key_values if use_cache else None)

    def packed_loss(
        self, packed: Packed, frames: Tensor, weights: Tensor | None = None, recompute: bool = False
    ) -> PackedLoss:
        """The loss of dialogues in one row, and of each as if it were alone. frames (F, N, D) of all of them.

        `weights` (T,) scale the labels, by default those at frames by `stream_loss_weight`. `recompute` is
        gradient checkpointing. Sums, not means: who adds up packs and workers divides by their labels.
        Raises ValueError where nothing is learned.
        """
        learned = (packed.labels != IGNORED).nonzero().flatten()
        if not len(learned):
            raise ValueError("the pack has no label: nothing in it is learned")
        with self._mixed():
            embeddings = self.embed(packed.input_ids, frames)
        if self._adapted is not None:
            states = self._adapted(embeddings, packed, learned, recompute)
        else:
            with self._mixed():
                states = self._states(embeddings, packed, recompute)[learned]
        at_frame = torch.eq(packed.input_ids[learned], self.frame_id)
        labels = packed.labels[learned]
        pieces = zip(states.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
        with self._mixed():
            if len(learned) > LOGIT_ROWS:
                losses = torch.cat([checkpoint(self._losses, *piece, use_reentrant=False) for piece in pieces])
            else:
                losses = self._losses(states, labels)
        scale = torch.where(at_frame, self.config.stream_loss_weight, 1.0) if weights is None else weights[learned]
        each = losses.detach()
        return PackedLoss((losses * scale).sum(), each[~at_frame].sum(), each[at_frame].sum())

    def _mixed(self) -> torch.autocast:
        """What is trained is held in fp32 and computed in the LLM's type."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.base_llm.dtype == torch.bfloat16)

    @cached_property
    def _adapted(self) -> AdaptedDecoder | None:
        return AdaptedDecoder.of(self.base_llm)

    def _states(self, embeddings: Tensor, packed: Packed, recompute: bool) -> Tensor:
        """Last hidden states (T, H) by the LLM's own forward, under a mask of dialogues."""
        llm = self.base_llm
        if recompute != llm.is_activation_checkpointing:
            if recompute:
                llm.activation_checkpointing_enable({"use_reentrant": False})
            else:
                llm.activation_checkpointing_disable()
        hidden = llm.get_decoder()(
            inputs_embeds=embeddings[None],
            attention_mask=packed.block_mask,
            position_ids=packed.positions[None],
            use_cache=False,
        )
        states: Tensor = hidden.last_hidden_state[0]
        return states

    def _losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (K,) of hidden states (K, H) in the vocabulary."""
        logits = self.base_llm.get_output_embeddings()(states)
        return F.cross_entropy(logits.float(), labels, reduction="none")


def streaming_loss(
    logits: Tensor, labels: Tensor, at_frame: Tensor, weight: float, denominator: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy over learned text and over the streaming EOS at frames.

    logits (..., V); labels (...), -100 where nothing is learned, already shifted; at_frame (...) bool.
    Sum over learned positions, those at frames scaled by `weight`, divided by their unweighted number.
    With nothing learned it is 0 and still has a gradient. `denominator` replaces the number, for a mean
    over more than this batch (accumulated steps, other workers). VideoLLM-online, section 3.2.
    """
    labels = labels.flatten()
    losses = F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=IGNORED, reduction="none")
    weights = torch.where(at_frame.flatten(), weight, 1.0)
    if denominator is None:
        denominator = (labels != IGNORED).sum().clamp(min=1)
    return (losses * weights).sum() / denominator
