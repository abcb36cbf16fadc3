"""Text to conditioning: prompts of any length, in 77-token chunks that are encoded apart and joined along the tokens.

    75 tokens -> [start, 75 tokens, end] -> text encoder -> (77, D);   n chunks -> (77 n, D)

SD1 reads CLIP's last layer, SD2 open_clip's last but one through the final norm (its last layer is left out on loading),
SDXL both towers' last but one without it, beside the second tower's pooled projection of the first chunk
(sgm `FrozenCLIPEmbedder`, `FrozenOpenCLIPEmbedder2`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .components import Components

CHUNK = 75  # tokens between the start and the end token


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told, for N pictures.

    `context`: (N, T, D) token embeddings; `pooled`: (N, P) and `time_ids`: (N, 6) for SDXL, else None.
    """

    context: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    @property
    def added(self) -> dict[str, torch.Tensor] | None:
        """What diffusers' networks take beside the context (SDXL), or None."""
        return None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def __len__(self) -> int:
        return self.context.shape[0]

    def __getitem__(self, rows) -> Conditioning:
        """The rows of a slice or of a list of indices."""
        return self._each(lambda value: value[rows])

    def repeat(self, times: int) -> Conditioning:
        """All N rows, `times` times over: [0..N-1, 0..N-1, ...]."""
        return self if times == 1 else self._each(lambda value: value.repeat(times, *[1] * (value.ndim - 1)))

    def repeat_each(self, times: int) -> Conditioning:
        """Every row `times` times: [0, 0, ..., 1, 1, ...]."""
        return self if times == 1 else self._each(lambda value: value.repeat_interleave(times, 0))

    def to(self, device: torch.device) -> Conditioning:
        """The same on `device`."""
        return self._each(lambda value: value.to(device))

    def _each(self, change) -> Conditioning:
        parts = (self.context, self.pooled, self.time_ids)
        return Conditioning(*[None if part is None else change(part) for part in parts])


def encode(components: Components, prompts: Sequence[str], zero_empty: Sequence[bool] = ()) -> Conditioning:
    """Encode prompts, all padded to as many chunks as the longest needs.

    `zero_empty`: for each prompt, whether SDXL may replace it by zeros if it is empty (its negative prompt; sgm
    `force_uc_zero_embeddings`). Returns `context` (N, 77 chunks, D) and, for SDXL, `pooled` (N, P), on the device.
    """
    tokens = [tokenize(components.tokenizers[0], prompt) for prompt in prompts]
    chunks = max(1, *(-(-len(each) // CHUNK) for each in tokens))
    towers = [
        _run(encoder, tokenizer, tokens, chunks, components.family)
        for tokenizer, encoder in zip(components.tokenizers, components.text_encoders)
    ]
    context = torch.cat([hidden for hidden, _ in towers], dim=-1)
    pooled = towers[-1][1]
    if components.family == "sdxl":
        for row, allowed in enumerate(zero_empty):
            if allowed and not prompts[row].strip():
                context[row], pooled[row] = 0, 0
    return Conditioning(context.to(components.dtype), None if pooled is None else pooled.to(components.dtype))


def encode_pair(components: Components, negative: str, prompt: str) -> Conditioning:
    """[negative, prompt] with as many chunks each: N = 2."""
    return encode(components, [negative, prompt], zero_empty=[True, False])


def with_size(conditioning: Conditioning, width: int, height: int) -> Conditioning:
    """SDXL's six numbers for an uncropped picture of this size: (height, width, top, left, height, width) in pixels."""
    if conditioning.pooled is None:
        return conditioning
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=conditioning.pooled.dtype)
    return replace(conditioning, time_ids=ids.to(conditioning.pooled.device).repeat(len(conditioning), 1))


def tokenize(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt of any length, without start, end or padding."""
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(prompt))


def chunked(tokens: list[int], chunks: int, start: int, end: int, pad: int) -> list[list[int]]:
    """Rows of 77: start, up to 75 tokens, end, padding."""
    rows = [tokens[at * CHUNK : (at + 1) * CHUNK] for at in range(chunks)]
    return [[start, *row, end, *[pad] * (CHUNK - len(row))] for row in rows]


def hidden_of(answer, family: str) -> torch.Tensor:
    """(N, T, D): the layer of a text encoder's answer that a family's UNet reads."""
    return answer.hidden_states[-2] if family == "sdxl" else answer.last_hidden_state


@torch.no_grad()
def _run(encoder, tokenizer, prompts: list[list[int]], chunks: int, family: str):
    """(N, 77 chunks, D) hidden states and (N, P) pooled projections (None but for SDXL's second tower)."""
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.tensor([row for tokens in prompts for row in chunked(tokens, chunks, start, end, pad)])
    answer = encoder(ids.to(encoder.device), output_hidden_states=family == "sdxl")
    hidden = hidden_of(answer, family)
    pooled = getattr(answer, "text_embeds", None)
    return hidden.reshape(len(prompts), -1, hidden.shape[-1]), None if pooled is None else pooled[::chunks].clone()
