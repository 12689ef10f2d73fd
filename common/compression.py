"""How a training sum and the round's weights are written in fewer bytes, and read again.

A sum holds n_b * delta_b. The change delta_b is coded and the evidence n_b travels beside it as it is, so that scales are as
tight as the change. Rounding is stochastic (Gupta et al. 2015): right in the mean, zeros stay zeros. What it drops is handed
back, to be added to the next change (error feedback: Seide et al. 2014, Karimireddy et al. 2019). Noise of privacy has been
added before, so all this is post-processing and its draws may be seeded.

`bfloat16/NAME` holds the upper half of each float32, `int8/NAME` whole numbers and `scale/NAME` one scale for each 1,024 of them;
both are `[rows, numbers]`, a row for each block of the parameter. A name without prefix is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from oncofed.common.blocks import EVIDENCE, Blocks, Sum
from oncofed.common.exchange import Transport

BFLOAT16, INT8, SCALE = "bfloat16/", "int8/", "scale/"
"""Before the name of a coded array; no parameter of a model is called so."""

CHUNK = 1024
"""Numbers that share a scale: 0.4 % more bytes, and a large number costs few others their resolution."""

SMALL = 512
"""Arrays of fewer numbers stay in float32: biases, covariates, baselines of a few cancer types; 1 % of the bytes."""

_LEVELS = 127
_AT_ONCE = 64


def to_bfloat16(value: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Float32 as uint16 words of bfloat16, each rounded up or down so that the mean is right; finite stays finite."""
    bits = np.array(value, dtype=np.float32, order="C").view(np.uint32)
    words = ((bits + draws.integers(0, 1 << 16, bits.shape, dtype=np.uint32)) >> 16).astype(np.uint16)
    beyond = (words & 0x7F80) == 0x7F80  # the largest numbers would be rounded up to infinity
    return np.where(beyond, (bits >> 16).astype(np.uint16), words)


def from_bfloat16(words: np.ndarray) -> np.ndarray:
    """The float32 of uint16 words."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def to_int8(value_RM: np.ndarray, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Float32 `[rows, numbers]` as int8, and scales `[rows, chunks]`: the largest magnitude of a chunk becomes 127."""
    chunks = _in_chunks(value_RM)
    rows, count, each = chunks.shape
    flat, whole = chunks.reshape(rows * count, each), np.empty((rows * count, each), dtype=np.int8)
    scale = np.empty(rows * count, dtype=np.float32)
    for at in range(0, len(flat), _AT_ONCE):  # in pieces that stay in the cache
        part = flat[at : at + _AT_ONCE]
        own = np.maximum(part.max(axis=1), -part.min(axis=1)) / np.float32(_LEVELS) if each else np.zeros(0, np.float32)
        scale[at : at + _AT_ONCE] = own
        steps = part / np.where(own > 0, own, np.float32(np.inf))[:, None]
        steps += draws.random(part.shape, dtype=np.float32)
        np.floor(steps, out=steps)
        whole[at : at + _AT_ONCE] = np.clip(steps, -_LEVELS, _LEVELS, out=steps)
    return _out_of_chunks(whole.reshape(chunks.shape), value_RM.shape), scale.reshape(rows, count)


def from_int8(whole_RM: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 of int8 numbers `[rows, numbers]` with scales `[rows, chunks]`."""
    return _out_of_chunks(_in_chunks(whole_RM) * scale[:, :, None], whole_RM.shape)


def round_weights(arrays: Sum, draws: np.random.Generator) -> Sum:
    """Weights as they travel in bfloat16; small ones, and what is no float32, as they are.

    They are off by 2^-7 of a weight at most, and by nothing in the mean.
    """
    coded = {n: v for n, v in arrays.items() if v.dtype == np.float32 and v.size >= SMALL}
    return {n: v for n, v in arrays.items() if n not in coded} | {
        BFLOAT16 + name: to_bfloat16(coded[name], draws) for name in sorted(coded)
    }


def read_weights(arrays: Sum) -> Sum:
    """The inverse of `round_weights`, up to its rounding."""
    return {
        name.removeprefix(BFLOAT16): from_bfloat16(value) if name.startswith(BFLOAT16) else value
        for name, value in arrays.items()
    }


@dataclass(frozen=True)
class Coding:
    """How changes are written; site and server hold the same one. With `only_evidence` blocks without evidence are not sent."""

    upload: str = "float32"
    only_evidence: bool = True

    @classmethod
    def of(cls, transport: Transport, *, secure_sums: bool = False) -> Coding:
        """A study's coding. Under secure sums every site sends every block, as it is: what is left out would tell of the site."""
        return cls("float32", False) if secure_sums else cls(transport.upload, transport.only_evidence)

    def pack(
        self, total: Sum, blocks: Blocks, draws: np.random.Generator, dropped: Mapping[str, np.ndarray] | None = None
    ) -> tuple[Sum, Sum]:
        """A training sum as it travels, and what rounding drops of the change, by parameter.

        `dropped` is what the round before dropped, in units of the change and not of its product with the evidence: where little
        stands behind a block, an old remainder must not be blown up. A block without evidence keeps its remainder.
        """
        packed: Sum = {}
        left: Sum = {}
        for name, value in total.items():
            if name not in blocks.owners:
                packed[name] = value
                continue
            n_R = blocks.rows(total[EVIDENCE], name).astype(np.float32)
            sent_R = self._sent(n_R)
            if self._plain(value.shape):
                if sent_R.all():
                    packed[name] = value
                elif sent_R.any():
                    packed[name] = value[sent_R]
                continue
            value_RM = value.reshape(len(n_R), -1)
            before = (dropped or {}).get(name)
            before_RM = None
            if before is not None and before.shape == value.shape:
                before_RM = before.reshape(value_RM.shape)
            idle_R = n_R <= 0
            left_RM = value_RM / np.where(idle_R, np.float32(np.inf), n_R)[:, None]
            if before_RM is not None:
                left_RM += before_RM
                left_RM[idle_R] = 0.0
            coded = self._code(name, left_RM if sent_R.all() else left_RM[sent_R], draws)
            told_RM = self._decode(name, coded)
            if sent_R.all():
                left_RM -= told_RM
            else:
                left_RM[sent_R] -= told_RM
            left_RM[idle_R] = 0.0 if before_RM is None else before_RM[idle_R]
            left[name] = left_RM.reshape(value.shape)
            if sent_R.any():
                packed |= coded
        return packed, left

    def unpack(self, arrays: Sum, blocks: Blocks, shapes: Mapping[str, tuple[int, ...]], site: str) -> Sum:
        """The training sum of what a site sent; `shapes` are those of the whole sum.

        Raises `ValueError` naming the site where evidence, names, shapes, types or scales are not what this coding writes.
        """
        evidence = arrays.get(EVIDENCE, np.zeros(0))
        if evidence.dtype.kind != "f":
            raise ValueError(f"{site}: '{EVIDENCE}' has dtype {evidence.dtype}, wanted floating point")
        if evidence.shape != (len(blocks.names),) or not np.isfinite(evidence).all():
            raise ValueError(
                f"{site}: the sum has other arrays than the model: '{EVIDENCE}' must be {len(blocks.names)} finite numbers"
            )
        total: Sum = {name: arrays[name] for name in shapes if name not in blocks.owners and name in arrays}
        seen = set(total)
        for name in (n for n in shapes if n in blocks.owners):
            n_R, shape = blocks.rows(evidence, name).astype(np.float32), shapes[name]
            sent_R = self._sent(n_R)
            names = set(self._names(name, shape)) if sent_R.any() else set()
            if not names <= arrays.keys():
                raise ValueError(
                    f"{site}: the sum has other arrays than the model: {sorted(names - arrays.keys())} are missing, as "
                    f"transport.upload = '{self.upload}' writes them"
                )
            seen |= names
            if self._plain(shape) and sent_R.all():
                total[name] = arrays[name]
                continue
            total[name] = np.zeros(shape, dtype=np.float32)
            if not sent_R.any():
                continue
            rows = int(sent_R.sum())
            if self._plain(shape):
                _checked(arrays[name], np.float32, (rows, *shape[1:]), name, site)
                total[name][sent_R] = arrays[name]
            else:
                told_RM = total[name].reshape(len(n_R), -1)
                self._check(arrays, name, rows, told_RM.shape[1], site)
                with np.errstate(over="ignore", invalid="ignore"):  # what is too large is refused where sums are added
                    told_RM[sent_R] = self._decode(name, arrays) * n_R[sent_R, None]
        if seen != arrays.keys():
            raise ValueError(f"{site}: the sum has other arrays than the model: {sorted(arrays.keys() - seen)[:5]}")
        return total

    def _sent(self, n_R: np.ndarray) -> np.ndarray:
        return n_R > 0 if self.only_evidence else np.ones(len(n_R), dtype=bool)

    def _plain(self, shape: tuple[int, ...]) -> bool:
        return self.upload == "float32" or int(np.prod(shape)) < SMALL

    def _names(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        if self._plain(shape):
            return (name,)
        return (BFLOAT16 + name,) if self.upload == "bfloat16" else (INT8 + name, SCALE + name)

    def _code(self, name: str, value_RM: np.ndarray, draws: np.random.Generator) -> Sum:
        if self.upload == "bfloat16":
            return {BFLOAT16 + name: to_bfloat16(value_RM, draws)}
        whole, scale = to_int8(value_RM, draws)
        return {INT8 + name: whole, SCALE + name: scale}

    def _decode(self, name: str, arrays: Sum) -> np.ndarray:
        if self.upload == "bfloat16":
            return from_bfloat16(arrays[BFLOAT16 + name])
        return from_int8(arrays[INT8 + name], arrays[SCALE + name])

    def _check(self, arrays: Sum, name: str, rows: int, numbers: int, site: str) -> None:
        """Refuse a coded parameter of another type or shape, and scales that are no sizes."""
        wanted: dict[str, tuple[type, tuple[int, ...]]] = {BFLOAT16 + name: (np.uint16, (rows, numbers))}
        if self.upload == "int8":
            wanted = {INT8 + name: (np.int8, (rows, numbers)), SCALE + name: (np.float32, (rows, _chunks(numbers)))}
        for key, (kind, shape) in wanted.items():
            _checked(arrays[key], kind, shape, key, site)
        scale = arrays.get(SCALE + name, np.zeros(0))
        if not np.isfinite(scale).all() or (scale < 0).any():
            raise ValueError(f"{site}: '{SCALE + name}' must hold finite scales of 0 or more")


def nbytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of arrays as they are."""
    return sum(value.nbytes for value in arrays.values())


def _checked(value: np.ndarray, kind: type, shape: tuple[int, ...], name: str, site: str) -> None:
    if value.dtype != kind:
        raise ValueError(f"{site}: '{name}' has dtype {value.dtype}, wanted {np.dtype(kind)}")
    if value.shape != shape:
        raise ValueError(f"{site}: '{name}' has shape {value.shape}, wanted {shape}")


def _chunks(numbers: int) -> int:
    return -(-numbers // CHUNK)


def _in_chunks(value_RM: np.ndarray) -> np.ndarray:
    """Rows `[rows, numbers]` as `[rows, chunks, numbers of a chunk]`, the last chunk filled up with zeros."""
    rows, numbers = value_RM.shape
    chunks, each = _chunks(numbers), min(CHUNK, numbers)
    if chunks * each != numbers:
        value_RM = np.pad(value_RM, ((0, 0), (0, chunks * each - numbers)))
    return value_RM.reshape(rows, chunks, each)


def _out_of_chunks(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows, chunks, each = value.shape
    return np.ascontiguousarray(value.reshape(rows, chunks * each)[:, : shape[1]])
