r"""The network of ICM-LoRA: a conditional variational auto-encoder over flattened adapters.

    encoder:  d x [Conv1d(k 7, stride 2) - GroupNorm - LeakyReLU] -> Linear -> 256
              [features, c] -> mu, log sigma^2            z = mu + sigma * e,  e ~ N(0, I)
    decoder:  Linear([z, c]) -> d x [ConvTranspose1d(k 7, stride 2) - GroupNorm - ELU] -> Conv1d
    loss:     mean (x' - x)^2 + weight * KL(N(mu, sigma^2) || N(0, I))

The KL is summed over the latent and averaged over the batch; the squared error is averaged over the
real entries, the padding left out (derived). The published network has batch norm where this one
has GroupNorm (derived): it is trained on two snapshots at a time.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

KERNEL = 7
NORM_CHANNELS = 8
"""Channels of one group. At the narrowest place a position is all there is, so a group needs
several channels to have a spread."""


class CVAE(nn.Module):
    """Encoder and decoder under one condition.

    Args:
        length: entries of a vector; it is padded with zeros to a multiple of `2 ** len(channels)`.
        condition: entries of the task vector.
        channels: of the encoder's convolutions, each of which halves the length.
        latent: entries of z, and of the features before it.
    """

    def __init__(self, length: int, condition: int, channels: Sequence[int], latent: int) -> None:
        super().__init__()
        self.length = length
        multiple = 2 ** len(channels)
        self.padding = -length % multiple
        shortest = (length + self.padding) // multiple
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([1, *channels]):
            layers += [
                nn.Conv1d(before, after, KERNEL, 2, KERNEL // 2),
                _norm(after),
                nn.LeakyReLU(),
            ]
        self.encoder = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels[-1] * shortest, latent)
        )
        self.mean = nn.Linear(latent + condition, latent)
        self.log_variance = nn.Linear(latent + condition, latent)
        layers = [
            nn.Linear(latent + condition, channels[-1] * shortest),
            nn.Unflatten(1, (channels[-1], shortest)),
        ]
        mirrored = [*reversed(channels), channels[0]]
        for before, after in itertools.pairwise(mirrored):
            layers += [
                nn.ConvTranspose1d(before, after, KERNEL, 2, KERNEL // 2, output_padding=1),
                _norm(after),
                nn.ELU(),
            ]
        self.decoder = nn.Sequential(*layers, nn.Conv1d(channels[0], 1, KERNEL, 1, KERNEL // 2))

    def encode(
        self, x: Float[Tensor, "batch length"], c: Float[Tensor, "batch condition"]
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Return the mean and the log variance of z."""
        features = torch.cat([self.encoder(F.pad(x, (0, self.padding))[:, None]), c], 1)
        return self.mean(features), self.log_variance(features)

    def decode(
        self, z: Float[Tensor, "batch latent"], c: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch length"]:
        """Return the vectors of latents, without the padding."""
        found: Tensor = self.decoder(torch.cat([z, c], 1))
        return found[:, 0, : self.length]

    def forward(
        self, x: Float[Tensor, "batch length"], c: Float[Tensor, "batch condition"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction, mean and log variance; z is drawn only while training."""
        mean, log_variance = self.encode(x, c)
        z = mean
        if self.training:
            z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decode(z, c), mean, log_variance


def negative_elbo(
    model: nn.Module, batch: tuple[Tensor, Tensor], kl_weight: float
) -> Float[Tensor, ""]:
    """Return the training loss of `(vectors, conditions)`."""
    x, c = batch
    found, mean, log_variance = model(x, c)
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
    return F.mse_loss(found, x) + kl_weight * divergence


def _norm(channels: int) -> nn.GroupNorm:
    groups = 1 if channels % NORM_CHANNELS else channels // NORM_CHANNELS
    return nn.GroupNorm(groups, channels)
