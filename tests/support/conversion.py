"""The weights of an ldm UNet under diffusers' names, by the two layouts' tables and nobody's converter."""

import re

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
TOP = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
MIDDLE = {0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}


def to_diffusers(state):
    """An ldm state dict under diffusers' names."""
    return {_name(key, state): value for key, value in state.items()}


def _name(key, state):
    for ours, theirs in TOP.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    side, block, layer, rest = re.fullmatch(r"(\w+?)_blocks?\.(?:(\d+)\.)?(\d+)\.(.+)", key).groups()
    return f"{_place(side, block and int(block), int(layer), rest, state)}.{_inner(rest)}"


def _place(side, block, layer, rest, state):
    """Two pairs and a down-sampler make a level of the encoder, three pairs one of the decoder."""
    if side == "middle":
        return MIDDLE[layer]
    if side == "input":
        level, index = divmod(block - 1, 3)
        if rest.startswith("op."):
            return f"down_blocks.{level}.downsamplers.0"
        return f"down_blocks.{level}.{'attentions' if layer else 'resnets'}.{index}"
    level, index = divmod(block, 3)
    if f"output_blocks.{block}.{layer}.conv.weight" in state:
        return f"up_blocks.{level}.upsamplers.0"
    return f"up_blocks.{level}.{'attentions' if layer else 'resnets'}.{index}"


def _inner(rest):
    for ours, theirs in RESNET.items():
        if rest.startswith(ours + "."):
            return theirs + rest[len(ours) :]
    return re.sub(r"^op\.", "conv.", rest)
