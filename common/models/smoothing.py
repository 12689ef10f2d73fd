"""Stage 1 of Path-GPTOmic: MLP-A, which makes averages of samples land on sensible embeddings.

Wang et al., ISBI 2024 (arXiv 2403.11375), section 2.1: cells are mixed before scGPT, which is frozen, and a small network learns
to give the mixture of their labels; then its last layer, the classifier, is dropped and the rest is frozen too.
Shapes: N samples, G genes, B mixtures of K samples each, C classes, D width of scGPT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from oncofed.common.files import replacing
from oncofed.common.models.scgpt import Checkpoint
from oncofed.common.models.tokens import Tokeniser
from oncofed.common.saved import load_arrays
from oncofed.common.splits import seed_from
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 128


class Smoother(nn.Module):
    """MLP-A, widths D-128-128-128 with ReLU between: embeddings `[N, D]` of scGPT -> `[N, 128]`.

    No ReLU after the last layer: its output is the embedding that later stages read, and half of it would be zeros.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        layers = [m for a, b in pairwise(self.widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, e_ND: Tensor) -> Tensor:
        # scGPT's embeddings have length 1, so their numbers are near 0 and a first layer of usual size would hardly see them
        # (simulated with 17 classes at D = 512: three times the steps to the same error). The paper is silent on scale.
        return self.layers(e_ND * self.widths[0] ** 0.5)


@dataclass(frozen=True)
class Mixture:
    """How samples are mixed: `samples` of them, with shares from a flat Dirichlet distribution.

    Two is the paper's, lambda ~ U(0, 1); more (2 to 200) is closer to bulk tissue and not the paper's (path_gptomic.md 1.3).
    `concentration` above 1 makes the shares more even, below 1 less.
    """

    samples: int = 2
    concentration: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 2 or self.concentration <= 0:
            raise ValueError(f"{self}: mix at least 2 samples, with a concentration above 0")

    def draw(self, rng: np.random.Generator, n: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices into n samples and shares, both `[B, K]`; shares sum to 1."""
        shares_BK = rng.dirichlet(np.full(self.samples, self.concentration), size=batch)
        return rng.integers(n, size=shares_BK.shape), shares_BK


def mix(x_BKG: np.ndarray, shares_BK: np.ndarray) -> np.ndarray:
    """Weighted means `[B, G]` over K samples: of expression on a linear scale, or of one-hot labels."""
    return np.einsum("bkg,bk->bg", x_BKG, shares_BK)


@dataclass(frozen=True)
class Trained:
    """MLP-A, the classifier that taught it, the training labels' mean `[C]`, and the loss of each step."""

    smoother: Smoother
    classifier: nn.Linear
    classes: tuple[str, ...]
    mean_label: np.ndarray
    curve: tuple[float, ...]


class _Mixtures:
    """Draws mixtures of samples as scGPT's embeddings `[B, D]` with their mixed labels `[B, C]`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        x_NG: np.ndarray,
        labels: Sequence[str],
        genes: tuple[str, ...],
        classes: tuple[str, ...],
        mixture: Mixture,
        seed: int,
    ) -> None:
        if x_NG.shape != (len(labels), len(genes)) or not len(labels):
            raise ValueError(
                f"expression of shape {x_NG.shape}, but {len(labels)} labels and {len(genes)} genes; give one row each"
            )
        if (x_NG < 0).any():
            raise ValueError(
                "negative expression: samples are mixed on a linear scale; give counts per million or TPM, no z-scores"
            )
        self._network, self._tokeniser = checkpoint.network, Tokeniser(checkpoint.vocab, checkpoint.settings, genes)
        self._x_NG, self._mixture = x_NG, mixture
        self.label_NC = np.array(labels, dtype=str)[:, None] == np.array(classes, dtype=str)
        self._rng = np.random.default_rng(seed)

    @torch.no_grad()
    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        rows_BK, shares_BK = self._mixture.draw(self._rng, len(self._x_NG), batch)
        # From here on as bulk tissue is delivered (client/data/units.py), so that both stages see one scale.
        x_BG = np.log2(mix(self._x_NG[rows_BK], shares_BK) + 1.0)
        device = next(self._network.parameters()).device
        label_BC = torch.from_numpy(mix(self.label_NC[rows_BK], shares_BK)).float()
        return self._network(*self._tokeniser.encode(x_BG).to(device)), label_BC.to(device)


def train_smoother(
    checkpoint: Checkpoint,
    x_NG: np.ndarray,
    labels: Sequence[str],
    genes: tuple[str, ...],
    *,
    steps: int = 2000,
    batch: int = 32,
    mixture: Mixture = Mixture(),
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train MLP-A on mixtures of samples; scGPT stays as it is.

    `x_NG` is linear and not negative (counts per million, TPM), NaN where a gene was not measured; `labels` name the cell type,
    or in the bulk variant (ours, not the paper's) the cancer type, of each sample. `progress` is called with each step's number.
    Raises `ValueError` on other shapes or values, on fewer than two classes, and what `Tokeniser` does.
    """
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ValueError(f"all samples have the label {list(classes)}: a mixture of labels needs two classes or more")
    mixtures = _Mixtures(checkpoint, x_NG, labels, genes, classes, mixture, seed_from(seed, "mixtures"))
    checkpoint.network.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(seed, "smoother"))
        smoother = Smoother((checkpoint.settings.embsize, WIDTH, WIDTH, WIDTH))
        classifier = nn.Linear(WIDTH, len(classes))
    model = nn.Sequential(smoother, classifier).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    curve = []
    for step in range(steps):
        e_BD, label_BC = mixtures.draw(batch)
        # The paper says "regression target" and no more. Cross-entropy with the mixed label is one: it is least where the
        # softmax equals the mixture, as squared error is, but it keeps its slope where the softmax is wrong and sure, and its
        # scale does not shrink with the number of classes. The label's own entropy is taken off: 0 is perfect.
        loss = F.kl_div(torch.log_softmax(model(e_BD), dim=-1), label_BC, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
        if progress is not None:
            progress(step)
    mean_label = mixtures.label_NC.mean(axis=0)
    return Trained(
        smoother.eval().requires_grad_(False), classifier.requires_grad_(False), classes, mean_label, tuple(curve)
    )


@torch.no_grad()
def held_out_error(
    trained: Trained,
    checkpoint: Checkpoint,
    x_NG: np.ndarray,
    labels: Sequence[str],
    genes: tuple[str, ...],
    *,
    mixtures: int = 256,
    batch: int = 32,
    mixture: Mixture = Mixture(),
    seed: int = 0,
) -> tuple[float, float]:
    """The share of a mixture given to the wrong classes, by the model and by the training labels' mean for everyone.

    Both are means over mixtures of samples that had no part in training: 0 is perfect, and a model that learned nothing
    from expression stands at the second.
    """
    unknown = sorted(set(labels) - set(trained.classes))
    if unknown:
        raise ValueError(
            f"held-out labels {unknown[:3]} are none of the classes {list(trained.classes[:5])}; leave these samples out"
        )
    source = _Mixtures(checkpoint, x_NG, labels, genes, trained.classes, mixture, seed_from(seed, "held out"))
    wrong, mean = 0.0, 0.0
    for start in range(0, mixtures, batch):
        e_BD, label_BC = source.draw(min(batch, mixtures - start))
        guess_BC = torch.softmax(trained.classifier(trained.smoother(e_BD)), dim=-1)
        wrong += float((guess_BC - label_BC).abs().sum() / 2)
        mean += float((torch.from_numpy(trained.mean_label).to(label_BC) - label_BC).abs().sum() / 2)
    return wrong / mixtures, mean / mixtures


@dataclass(frozen=True)
class Origin:
    """What MLP-A was trained on: `checkpoint` is scGPT's fingerprint without smoothing, `panel` the hash of the sorted genes."""

    checkpoint: str
    panel: str
    trained_on: str
    classes: tuple[str, ...]
    samples_mixed: int


def save_smoother(path: Path, smoother: Smoother, origin: Origin) -> None:
    """Write MLP-A, without the classifier, in one step."""
    tensors = {name: p.cpu().contiguous() for name, p in smoother.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(asdict(origin) | {"widths": smoother.widths})})


def load_smoother(path: Path) -> tuple[Smoother, Origin]:
    """A saved MLP-A, frozen, and its origin; raises `ValueError` with the remedy where the file is broken or something else."""
    try:
        arrays, about = load_arrays(path)
        widths = about.pop("widths")
        origin = Origin(**about | {"classes": tuple(about["classes"])})
        with torch.device("meta"):  # no memory on the word of a file
            smoother = Smoother(widths)
        smoother.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()}, assign=True)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a smoothing that `oncofed smooth` has written ({type(error).__name__}); write it again, or remove it to "
            "use scGPT's own embedding"
        ) from None
    return smoother.eval().requires_grad_(False), origin
