"""A checkpoint folder in exactly the layout of the published ones, with random weights at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 48, 2
SPECIAL = ("<pad>", "<cls>", "<eoc>")


def write_toy_checkpoint(
    folder: Path, genes: tuple[str, ...], seed: int = 0, *, max_seq_len: int = 1200, attention: str = "self_attn.Wqkv."
) -> dict[str, torch.Tensor]:
    """Write `args.json`, `vocab.json` and `best_model.pt` that know `genes`; returns the weights as saved.

    `attention` is how the stacked query, key and value are named: flash-attn 1, its wrapper for 2, or torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate((*genes, *SPECIAL))}
    args = {
        "embsize": WIDTH,
        "nheads": HEADS,
        "d_hid": HIDDEN,
        "nlayers": LAYERS,
        "n_layers_cls": 3,
        "dropout": 0.2,
        "pad_token": "<pad>",
        "pad_value": -2,
        "mask_value": -1,
        "n_bins": 51,
        "max_seq_len": max_seq_len,
        "input_style": "binned",
        "input_emb_style": "continuous",
        "training_tasks": "both",
        "fp16": True,
    }
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    weights = _weights(len(vocab), attention, torch.Generator().manual_seed(seed))
    torch.save(weights, folder / "best_model.pt")
    return weights


def _weights(entries: int, attention: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def draw(*shape: int, mean: float = 0.0, scale: float = 0.3) -> torch.Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": draw(WIDTH, mean=1.0), f"{name}.bias": draw(WIDTH)}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": draw(outputs, inputs, scale=1.5 / inputs**0.5), f"{name}.bias": draw(outputs)}

    weights = {
        "encoder.embedding.weight": draw(entries, WIDTH, scale=1.0),
        **norm("encoder.enc_norm"),
        **linear("value_encoder.linear1", WIDTH, 1),
        **linear("value_encoder.linear2", WIDTH, WIDTH),
        **norm("value_encoder.norm"),
    }
    for i in range(LAYERS):
        layer = f"transformer_encoder.layers.{i}"
        stacked = linear("qkv", 3 * WIDTH, WIDTH)
        weights |= {
            f"{layer}.{attention}weight": stacked["qkv.weight"],
            f"{layer}.{attention}bias": stacked["qkv.bias"],
            **linear(f"{layer}.self_attn.out_proj", WIDTH, WIDTH),
            **linear(f"{layer}.linear1", HIDDEN, WIDTH),
            **linear(f"{layer}.linear2", WIDTH, HIDDEN),
            **norm(f"{layer}.norm1"),
            **norm(f"{layer}.norm2"),
        }
    for k in (0, 2, 4):  # what served training only
        weights |= linear(f"decoder.fc.{k}", WIDTH if k < 4 else 1, WIDTH)
    return weights | {
        **linear("cls_decoder.out_layer", 1, WIDTH),
        **linear("mvc_decoder.gene2query", WIDTH, WIDTH),
        "flag_encoder.weight": draw(2, WIDTH),
    }
