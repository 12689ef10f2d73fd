"""scGPT (Cui et al. 2024, Nature Methods 21:1470) from its published checkpoint folder, on torch alone.

The published code asks for flash-attn and a dozen old packages; its forward pass is torch's own post-norm encoder with two
input encoders before it. Read from bowang-lab/scGPT @cebd6fa: scgpt/model/model.py, tasks/cell_emb.py, utils/util.py.
Shapes: N samples, L tokens (<cls> first), D width of the embedding, V entries of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILES = ("args.json", "vocab.json", "best_model.pt")
SMOOTHING = "smoothing.safetensors"
"""What stage 1 of Path-GPTOmic adds to the folder (common/models/smoothing.py)."""

CLS = "<cls>"
VALUE_LIMIT = 512.0
UNUSED = ("decoder.", "cls_decoder.", "mvc_decoder.", "flag_encoder.")
"""Parts of a checkpoint that served its training only: they stand behind or beside the embedding, never before it."""


@dataclass(frozen=True)
class ScGPTSettings:
    """The keys of `args.json` on which tokens and forward pass depend, under their names there."""

    embsize: int
    nheads: int
    d_hid: int
    nlayers: int
    n_bins: int
    max_seq_len: int
    pad_token: str
    pad_value: float

    @classmethod
    def read(cls, folder: Path) -> ScGPTSettings:
        """Raises `ValueError` where a key is missing or odd, or where the checkpoint is of another kind."""
        path, args = _json(folder, "args.json")
        style, norm = args.get("input_emb_style"), args.get("norm", "post")
        if style != "continuous" or norm != "post":
            raise ValueError(
                f"{path}: input_emb_style is {style!r} and norm {norm!r}, but only 'continuous' and 'post' are supported; "
                "take a checkpoint of that kind, e.g. whole-human"
            )
        kinds: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}
        odd = [
            f"{f.name} = {args.get(f.name)!r}"
            for f in fields(cls)
            if not isinstance(args.get(f.name), kinds[str(f.type)]) or isinstance(args.get(f.name), bool)
        ]
        if odd:
            raise ValueError(f"{path}: missing or odd {', '.join(odd)}; take args.json from the folder of the weights")
        settings = cls(**{f.name: args[f.name] for f in fields(cls)})
        heads, width = settings.nheads, settings.embsize
        if min(heads, width, settings.d_hid, settings.nlayers) < 1 or width % heads or settings.n_bins < 3:
            raise ValueError(
                f"{path}: {settings} is no scGPT: sizes are positive, nheads divides embsize, n_bins is 3 or more; "
                "take args.json from the folder of the weights"
            )
        return settings


class GeneEncoder(nn.Module):
    """LayerNorm(E[id]): ids `[N, L]` -> `[N, L, D]`."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, width)
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, ids_NL: Tensor) -> Tensor:
        return self.enc_norm(self.embedding(ids_NL))


class ValueEncoder(nn.Module):
    """LayerNorm(W2 relu(W1 min(v, 512))): values `[N, L]` -> `[N, L, D]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, width)
        self.linear2 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, values_NL: Tensor) -> Tensor:
        h_NLD = F.relu(self.linear1(values_NL.clamp(max=VALUE_LIMIT).unsqueeze(-1)))
        return self.norm(self.linear2(h_NLD))


class ScGPT(nn.Module):
    """The network up to the embedding of a sample; no positional encoding, so the order of genes means nothing."""

    def __init__(self, settings: ScGPTSettings, entries: int) -> None:
        super().__init__()
        self.encoder = GeneEncoder(entries, settings.embsize)
        self.value_encoder = ValueEncoder(settings.embsize)
        # Dropout stands at 0: the network is frozen, and a later .train() must not make it random.
        layer = nn.TransformerEncoderLayer(
            settings.embsize, settings.nheads, settings.d_hid, dropout=0.0, batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(layer, settings.nlayers, enable_nested_tensor=False)

    def forward(self, ids_NL: Tensor, values_NL: Tensor, padding_NL: Tensor) -> Tensor:
        """The <cls> position of the last layer, of length 1: `[N, D]`; `padding_NL` is True where there is no token."""
        x_NLD = self.encoder(ids_NL) + self.value_encoder(values_NL)
        return F.normalize(self.transformer_encoder(x_NLD, src_key_padding_mask=padding_NL)[:, 0], dim=-1)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder: settings, gene symbol -> token id, and the frozen network in evaluation mode."""

    settings: ScGPTSettings
    vocab: dict[str, int]
    network: ScGPT


def load_scgpt(folder: Path) -> Checkpoint:
    """The checkpoint in `folder` (`args.json`, `vocab.json`, `best_model.pt`), every parameter and shape checked.

    Raises `ValueError` that names file, parameter, what was seen, what was wanted and the remedy. Executes nothing of the file.
    """
    settings = ScGPTSettings.read(folder)
    vocab = _vocab(folder, settings.pad_token)
    with torch.device("meta"):  # shapes without memory: the values come from the file
        network = ScGPT(settings, len(vocab))
    weights = _weights(folder, {name: tuple(p.shape) for name, p in network.state_dict().items()})
    network.load_state_dict(weights, assign=True)
    return Checkpoint(settings, vocab, network.eval().requires_grad_(False))


def fingerprint(folder: Path, *, smoothing: bool = True) -> str:
    """16 hexadecimal digits that change when a file of the checkpoint does; without `smoothing`, of scGPT's own alone."""
    own = FILES + ((SMOOTHING,) if smoothing and (folder / SMOOTHING).exists() else ())
    whole = hashlib.sha256()
    for name in own:
        with _path(folder, name).open("rb") as file:
            whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:16]


def _path(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(
            f"{folder}: {name} is missing; an scGPT checkpoint is a folder with {', '.join(FILES)}, as published by its authors"
        )
    return folder / name


def _json(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    path = _path(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # also bytes that are not UTF-8
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; download the file again")
    return path, content


def _vocab(folder: Path, pad_token: str) -> dict[str, int]:
    """Ids are rows of the embedding: each row has one name, and the two tokens that are no genes have theirs."""
    path, vocab = _json(folder, "vocab.json")
    missing = [token for token in (pad_token, CLS) if token not in vocab]
    if missing:
        raise ValueError(f"{path}: lacks the token {missing[0]}; take vocab.json from the folder of the weights")
    if any(type(i) is not int for i in vocab.values()) or set(vocab.values()) != set(range(len(vocab))):
        raise ValueError(
            f"{path}: the ids of its {len(vocab)} entries are not 0 to {len(vocab) - 1}, each once; download the file again"
        )
    return vocab


def _weights(folder: Path, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The file's tensors under torch's names, float32, exactly those in `wanted`."""
    path = _path(folder, "best_model.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise what they like on a broken or malicious file
        raise ValueError(
            f"{path}: not a plain state_dict of tensors ({type(error).__name__}), and nothing else is ever unpickled; download it "
            "again, or save one with torch.save(model.state_dict(), ...) where you trust the file"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds other things than tensors; save model.state_dict() alone")
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _torch_name(str(key))
        if name in weights:
            raise ValueError(f"{path}: holds {name} under two names, the second is {key}; keep one of them")
        if name in wanted or not name.startswith(UNUSED):
            weights[name] = value
    _check(path, {name: tuple(value.shape) for name, value in weights.items()}, wanted)
    return {name: value.float() for name, value in weights.items()}


def _torch_name(key: str) -> str:
    """flash-attn's names (of version 1, or wrapped for version 2) to torch's: both stack query, key and value in that order."""
    return key.replace("self_attn._impl.", "self_attn.").replace("self_attn.Wqkv.", "self_attn.in_proj_")


def _check(path: Path, seen: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(wanted.keys() - seen.keys()), sorted(seen.keys() - wanted.keys())
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} parameters are missing, first {missing[:3]}; check that args.json (nlayers) belongs to these "
            "weights, and that the whole file was downloaded"
        )
    if unexpected:
        raise ValueError(
            f"{path}: {len(unexpected)} parameters have no place in the model, first {unexpected[:3]}: without them the embedding "
            "would be another one; take a checkpoint without batch labels and domain-specific normalisation"
        )
    wrong = [
        f"{name} is {list(seen[name])}, wanted {list(wanted[name])}" for name in wanted if seen[name] != wanted[name]
    ]
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} parameters are of another shape: {'; '.join(wrong[:3])}; check that args.json (embsize, d_hid) "
            "and vocab.json belong to these weights"
        )
