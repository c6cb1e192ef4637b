# SPDX-License-Identifier: MIT
"""Autoencoder and variational autoencoder: images through a code of a few numbers, from which new ones are drawn.

"Auto-Encoding Variational Bayes" (Kingma & Welling 2013, arXiv 1312.6114). A decoder p(x|z) turns a code z ~ N(0, I)
into an image; an encoder q(z|x) = N(mu(x), diag sigma(x)^2) guesses the code of an image. Both are trained on the bound

    log p(x) >= ELBO = E_q[log p(x|z)] - KL(q(z|x) || N(0, I))                              (eq. 3)
    z = mu + sigma * noise,   noise ~ N(0, I)           so that a sample has a gradient     (section 2.4)
    KL = 1/2 sum over latents (mu^2 + sigma^2 - log sigma^2 - 1)                            (appendix B)

The loss is the negative ELBO in nats, summed over pixels, latents and images: a mean over pixels or latents would
change the balance of its two terms. log p(x|z) is one of

    "bce"   sum over pixels  x log p + (1 - x) log(1 - p)      Bernoulli; x in [0, 1], logits from the decoder
    "mse"   sum over pixels  -(x - mean)^2 / (2 s^2) - log s - 1/2 log 2 pi      Gaussian of fixed s, with its constant

beta weighs the KL term (beta-VAE: Higgins et al. 2017); variational=False drops it, with the noise: an autoencoder.
`log_likelihood` estimates log p(x) more tightly, from many samples (Burda et al. 2015, arXiv 1509.00519, eq. 8).

Departures. ReLU for tanh, and convolutions as a choice. Grey pixels under "bce" make a good loss, but no density (its
integral over [0, 1] is below 1), and its least value is not 0: compare such an ELBO only with others of its kind.

    model = VAE(VAEConfig(latent=8))
    loss, n = model.loss(images)  # (N, 1, 8, 8) in [0, 1];  (loss / n).backward()
    model.sample(16), model.interpolate(images[0], images[1], steps=8), grid(images, columns=4)

Letters: N images, C channels, H = W image size, L latents, K samples; x images, z codes.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VAEConfig:
    """What a VAE is built from; ValueError in one line for a value that cannot be built."""

    image_size: int = 8  # height and width: scikit-learn's digits
    channels: int = 1
    latent: int = 8  # all in use on the digits; a latent that does not pay for its KL switches itself off
    hidden: tuple[int, ...] = (128, 64)  # widths of the encoder's layers (the decoder's reversed); of "conv", channels
    kind: str = "mlp"  # "conv": one halving of the image per entry of hidden; worth its time from about 16 x 16
    reconstruction: str = "mse"  # "bce" suits images all but black and white; a grey pixel it takes for an unsure one
    sigma: float = 0.1  # s of "mse": near the error to be reached, which suits the bound; larger blurs and saves KL
    beta: float = 1.0  # 1 is the bound on log p(x); more: fewer, more separate latents and blurrier images
    variational: bool = True

    def __post_init__(self):
        def whole(x):
            return isinstance(x, int) and not isinstance(x, bool) and x >= 1

        def wanted(name, good, what):
            if not good:
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

        for name in ("image_size", "channels", "latent"):
            wanted(name, whole(getattr(self, name)), "a whole number >= 1")
        wanted("kind", self.kind in ("mlp", "conv"), "'mlp' or 'conv'")
        wanted("reconstruction", self.reconstruction in ("bce", "mse"), "'bce' or 'mse'")
        for name, low in (("sigma", "> 0"), ("beta", ">= 0")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and 0 <= value < math.inf
            wanted(name, number and (value > 0 or name == "beta"), f"a finite number {low}")
        wanted("variational", isinstance(self.variational, bool), "True or False")
        widths = isinstance(self.hidden, (tuple, list)) and all(whole(h) for h in self.hidden)
        wanted("hidden", widths and (self.hidden or self.kind == "mlp"), "whole numbers >= 1 (one or more for 'conv')")
        self.hidden = tuple(self.hidden)  # JSON knows only lists
        if self.kind == "conv":
            factor = 2 ** len(self.hidden)
            wanted("image_size", self.image_size % factor == 0, f"a multiple of {factor} (halved per entry of hidden)")


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, per latent: the shape of mu. Sum it over latents (appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1)


class VAE(nn.Module):
    """A (variational) autoencoder of images (N, C, H, W); see the module's docstring for the equations."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        c = self.config = config
        code = c.latent * (2 if c.variational else 1)  # mu and logvar, or the code itself
        if c.kind == "mlp":
            widths = (c.channels * c.image_size**2, *c.hidden)
            encoder, decoder = [nn.Flatten()], []
            for a, b in pairwise(widths):
                encoder += [nn.Linear(a, b), nn.ReLU()]
            for a, b in pairwise((c.latent, *reversed(widths))):
                decoder += [nn.Linear(a, b), nn.ReLU()]
            encoder += [nn.Linear(widths[-1], code)]  # (N, 2 L)
            decoder[-1] = nn.Unflatten(1, (c.channels, c.image_size, c.image_size))  # (N, C, H, W), no ReLU on pixels
        else:
            widths, side = (c.channels, *c.hidden), c.image_size // 2 ** len(c.hidden)
            flat = widths[-1] * side * side
            encoder, decoder = [], [nn.Linear(c.latent, flat), nn.ReLU(), nn.Unflatten(1, (widths[-1], side, side))]
            for a, b in pairwise(widths):  # kernel 4, stride 2: every pixel is under as many taps, so no checkerboard
                encoder += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU()]  # (N, b, H/2, W/2)
            for a, b in pairwise(reversed(widths)):
                decoder += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU()]  # (N, b, 2 H, 2 W)
            encoder += [nn.Flatten(), nn.Linear(flat, code)]  # (N, 2 L)
            decoder.pop()  # no ReLU on pixels
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """mu and logvar = log sigma^2, each (N, L), of images (N, C, H, W); an autoencoder gives its code and None.

        ValueError or TypeError unless x is floating point, of the configured shape, and for "bce" within [0, 1].
        """
        c = self.config
        if x.ndim != 4 or x.shape[1:] != (c.channels, c.image_size, c.image_size):
            wanted = f"(N, {c.channels}, {c.image_size}, {c.image_size})"
            raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}: divide bytes by 255")
        if c.reconstruction == "bce" and x.numel() and not (0 <= x.min() and x.max() <= 1):  # NaN fails it, too
            raise ValueError(f"x must lie in [0, 1] for 'bce', got {x.min().item():.4g} ... {x.max().item():.4g}")
        code = self.encoder(x)
        return tuple(code.chunk(2, dim=1)) if c.variational else (code, None)

    @staticmethod
    def reparameterise(mu: Tensor, logvar: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """A sample of N(mu, exp(logvar)), (N, L), with gradients to both; noise (N, L) is drawn unless given."""
        if logvar is None:
            return mu
        noise = torch.randn_like(mu) if noise is None else noise
        return mu + (0.5 * logvar).exp() * noise  # sigma, not sigma^2: hence the half

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z), (N, C, H, W), of codes (N, L): for "bce" in [0, 1]; for "mse" it may lie outside."""
        raw = self.decoder(z)
        return raw.sigmoid() if self.config.reconstruction == "bce" else raw

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Reconstructs images (N, C, H, W): in training through a sample of the code, in evaluation through mu."""
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterise(mu, logvar, noise) if self.training or noise is not None else mu)

    def _reconstruction(self, x: Tensor, z: Tensor) -> Tensor:
        """-log p(x|z) in nats, (N,); in float32 at least, for a sum over pixels in bfloat16 loses whole nats."""
        raw = self.decoder(z)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.config.reconstruction == "bce":
            nats = F.binary_cross_entropy_with_logits(raw, x.to(raw.dtype), reduction="none")
        else:
            s = self.config.sigma
            nats = ((x.to(raw.dtype) - raw) / s).square() / 2 + math.log(s) + 0.5 * math.log(2 * math.pi)
        return nats.flatten(1).sum(1)  # (N, C, H, W) -> (N,)

    def elbo_terms(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction -log p(x|z) at one sample, and KL, in nats per image, (N,) each: ELBO = -(their sum).

        Also in evaluation z is a sample, for at mu the sum would bound nothing. Give `noise` (N, L) to repeat it.
        """
        mu, logvar = self.encode(x)
        reconstruction = self._reconstruction(x, self.reparameterise(mu, logvar, noise))
        if logvar is None:
            return reconstruction, torch.zeros_like(reconstruction)
        return reconstruction, gaussian_kl(mu, logvar).sum(1).to(reconstruction.dtype)

    def loss(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, int]:
        """(sum over images of reconstruction + beta KL in nats, number of images) of x (N, C, H, W)."""
        reconstruction, kl = self.elbo_terms(x, noise)
        return (reconstruction + self.config.beta * kl).sum(), len(x)

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, samples: int = 100) -> Tensor:
        """log p(x) in nats, (N,), from below: log 1/K sum p(x, z) / q(z|x) over K samples; tighter as K grows.

        ValueError for an autoencoder, which has no likelihood, and for samples < 1.
        """
        self._is_variational("log_likelihood")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        mu, logvar = self.encode(x)
        log_weights = []
        for _ in range(samples):  # one after the other: K batches at a time would need K times the memory
            noise = torch.randn_like(mu)
            z = self.reparameterise(mu, logvar, noise)
            prior_over_q = 0.5 * (noise.square() + logvar - z.square()).sum(1)  # log p(z) - log q(z|x): 2 pi cancels
            log_weights.append(prior_over_q - self._reconstruction(x, z))  # (N,)
        return torch.stack(log_weights).logsumexp(0) - math.log(samples)  # (K, N) -> (N,)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n new images (n, C, H, W): the means of p(x|z) at z ~ N(0, I). ValueError for an autoencoder."""
        self._is_variational("sample")
        p = next(self.parameters())
        device = p.device if generator is None else generator.device
        return self.decode(torch.randn(n, self.config.latent, generator=generator, device=device).to(p))

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int) -> Tensor:
        """(steps, C, H, W): from image a (C, H, W) to b, as reconstructed, on the straight line between their codes."""
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}")
        mu, _ = self.encode(torch.stack((a, b)))  # (2, L)
        return self.decode(torch.lerp(mu[:1], mu[1:], torch.linspace(0, 1, steps).to(mu)[:, None]))

    def _is_variational(self, what):
        if not self.config.variational:
            raise ValueError(f"{what}: an autoencoder (variational=False) has no distribution over codes")

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors, each beside its place and then renamed over it."""
        safetensors, folder = _safetensors(), pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        save = safetensors.torch.save_file
        write_beside(folder / "model.safetensors", lambda path: save(tensors, path, {"format": "pt"}))
        text = json.dumps({"model_type": "vae", **dataclasses.asdict(self.config)}, indent=2) + "\n"
        write_beside(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "VAE":
        """The model of `save_pretrained`, on the CPU, in evaluation mode; ValueError names the file and its fault."""
        safetensors, folder = _safetensors(), pathlib.Path(folder)
        path = folder / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            kind = settings.pop("model_type", None) if isinstance(settings, dict) else settings
            if kind != "vae":
                raise ValueError(f"model_type must be 'vae', got {kind!r}")
            model = cls(VAEConfig(**settings))
            path = folder / "model.safetensors"
            tensors = safetensors.torch.load_file(path)
            have, want = ({name: tuple(x.shape) for name, x in xs.items()} for xs in (tensors, model.state_dict()))
            if have != want:
                name = min(name for name in have | want if have.get(name) != want.get(name))
                raise ValueError(f"{name} has shape {have.get(name)}, wanted {want.get(name)} (None: no such tensor)")
        except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: {error}".replace("\n", " ")) from None
        model.load_state_dict(tensors)
        return model.eval()


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("weights are read and written with safetensors: pip install safetensors") from None
    return safetensors


# Same as minimal/checkpoint.py: write_beside
def write_beside(path: str | os.PathLike, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write(temporary path)` in the folder of `path`, then renames the result to `path`: it stays whole."""
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as the umask has it; safetensors writes files that their owner alone can read
        write(beside)
        beside.chmod(mode)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the bytes
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def grid(images: Tensor, columns: int) -> Tensor:
    """One picture (C, rows (H + 1) - 1, columns (W + 1) - 1) of images (N, C, H, W), row by row, clamped to [0, 1].

    Grey lines of one pixel part them, and grey fills the last row. ValueError without images or columns.
    """
    if images.ndim != 4 or not len(images) or columns < 1:
        raise ValueError(f"grid: wanted images (N, C, H, W) with N, columns >= 1, got {tuple(images.shape)}, {columns}")
    cells = F.pad(images.clamp(0, 1), (0, 1, 0, 1), value=0.5)  # (N, C, H+1, W+1)
    empty = cells.new_full((-len(cells) % columns, *cells.shape[1:]), 0.5)
    table = torch.cat((cells, empty)).unflatten(0, (-1, columns))  # (rows, columns, C, H+1, W+1)
    return table.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :-1, :-1]


def _blobs(n: int, generator: torch.Generator) -> Tensor:
    """Images (n, 1, 8, 8) of one round spot each, decided by three numbers: the two of its centre and its radius."""
    x, y, radius = torch.rand(3, n, 1, 1, generator=generator)
    axis = torch.arange(8.0)
    square = (axis[:, None] - 1 - 5 * y).square() + (axis - 1 - 5 * x).square()  # (n, 8, 8)
    return torch.exp(-square / (2 * (0.8 + radius).square())).unsqueeze(1)


def _demo() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    train, test = _blobs(2000, generator), _blobs(500, generator)
    print(f"Spots with 3 degrees of freedom; mean squared error of the mean image {test.var(0).mean().item():.5f}")
    for name, settings in (
        ("autoencoder", dict(variational=False)),
        ("VAE", dict()),
        ("beta-VAE, 4", dict(beta=4.0)),
    ):
        torch.manual_seed(0)
        model = VAE(VAEConfig(latent=6, **settings))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for step in range(901):
            if step in (0, 900):
                with torch.no_grad():
                    reconstruction, kl = (term.mean().item() for term in model.elbo_terms(test))
                    error = (model.eval()(test) - test).square().mean().item()
                    model.train()
                bound = f"ELBO {-reconstruction - kl:7.2f} = " if model.config.variational else ""
                bound += f"log p(x|z) {-reconstruction:7.2f}" + (f" - KL {kl:.2f}" if model.config.variational else "")
                print(f"{name}, step {step}: {bound} nats an image, squared error {error:.5f}")
            loss, n = model.loss(train[torch.randint(len(train), (100,), generator=generator)])
            optimizer.zero_grad()
            (loss / n).backward()
            optimizer.step()
        if model.config.variational:
            with torch.no_grad():
                per_latent = gaussian_kl(*model.encode(test)).mean(0).sort(descending=True).values
            print("   KL of each latent:", *(f"{x:.2f}" for x in per_latent.tolist()))
            print(f"   log p(x) from 100 samples {model.log_likelihood(test).mean().item():.2f}")


if __name__ == "__main__":
    _demo()
