# SPDX-License-Identifier: MIT
"""The VAE against torch.distributions, probabilistic PCA in closed form, and scikit-learn's digits."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from minimal.vae import VAE, VAEConfig, gaussian_kl, grid

torch.set_num_threads(1)
KINDS = [dict(kind="mlp"), dict(kind="conv", hidden=(6, 10))]


def images(n, config):
    return torch.rand(n, config.channels, config.image_size, config.image_size)


# ------------------------------------------------------------------------------------------------- the KL (trap 15)


def kl_mean_over_latents(mu, logvar):
    return gaussian_kl(mu, logvar).mean(1)


def kl_logvar_as_log_sigma(mu, logvar):
    return 0.5 * (mu.square() + (2 * logvar).exp() - 2 * logvar - 1).sum(1)


def kl_backwards(mu, logvar):
    return 0.5 * ((mu.square() + 1) * (-logvar).exp() + logvar - 1).sum(1)


def kl_ours(mu, logvar):
    return gaussian_kl(mu, logvar).sum(1)


@pytest.mark.parametrize("variant", [kl_ours, kl_mean_over_latents, kl_logvar_as_log_sigma, kl_backwards])
def test_kl_against_torch_distributions(variant):
    mu, logvar = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    q = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
    right = torch.allclose(variant(mu, logvar), kl_divergence(q, p), rtol=1e-12, atol=1e-12)
    assert right == (variant is kl_ours)


def test_kl_by_monte_carlo():
    mu, logvar = torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.3, -2.0, 0.0]).double()
    z = mu + (0.5 * logvar).exp() * torch.randn(400_000, 3, dtype=torch.float64)
    ratio = Normal(mu, (0.5 * logvar).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    error = ratio.std(0) / len(z) ** 0.5
    assert ((ratio.mean(0) - gaussian_kl(mu, logvar)).abs() <= 5 * error).all() and error.max() < 0.003
    assert gaussian_kl(mu, logvar)[2] == 0  # q is the prior


# --------------------------------------------------------------------------- reparameterisation against closed forms


def sampled_with_variance(mu, logvar, noise):
    return mu + logvar.exp() * noise


def sampled_without_gradient(mu, logvar, noise):
    return (mu + (0.5 * logvar).exp() * noise).detach() + 0 * (mu + logvar)


@pytest.mark.parametrize("variant", [VAE.reparameterise, sampled_with_variance, sampled_without_gradient])
def test_reparameterised_gradient(variant):
    """E[(z - a)^2] = (mu - a)^2 + sigma^2 has the gradient 2 (mu - a) to mu, and sigma^2 to logvar = log sigma^2."""
    mu = torch.tensor([0.7, -0.2]).double().requires_grad_()
    logvar = torch.tensor([-1.0, 0.8]).double().requires_grad_()
    half = torch.randn(100_000, 2, dtype=torch.float64)
    noise = torch.cat((half, -half))  # antithetic: the mean is exact, only the variance is noisy
    noise = noise / noise.square().mean(0).sqrt()  # and now that is exact as well
    loss = (variant(mu, logvar, noise) - 0.5).square().mean(0)
    loss.sum().backward()
    right = (
        torch.allclose(loss, (mu - 0.5).square() + logvar.exp())
        and torch.allclose(mu.grad, 2 * (mu.detach() - 0.5))
        and torch.allclose(logvar.grad, logvar.detach().exp())
    )
    assert right == (variant is VAE.reparameterise)


def test_noise_is_drawn_anew_and_standard():
    mu, logvar = torch.full((50_000, 1), 3.0), torch.full((50_000, 1), math.log(4.0))
    z = VAE.reparameterise(mu, logvar)
    assert z.mean().item() == pytest.approx(3, abs=0.06) and z.std().item() == pytest.approx(2, abs=0.04)
    assert not torch.equal(z, VAE.reparameterise(mu, logvar))


# ------------------------------------------------------- the ELBO where the likelihood is known: probabilistic PCA


SIDE, L, SIGMA = 3, 2, 0.4


def linear_vae():
    """x = W z + b + sigma noise with orthogonal columns, so that the exact posterior is a diagonal Gaussian."""
    config = VAEConfig(image_size=SIDE, latent=L, hidden=(), reconstruction="mse", sigma=SIGMA)
    model = VAE(config).double()
    basis = torch.linalg.qr(torch.randn(SIDE**2, L, dtype=torch.float64))[0]
    W, b = basis * torch.tensor([1.5, 0.7]).double(), torch.randn(SIDE**2, dtype=torch.float64)
    M = W.T @ W + SIGMA**2 * torch.eye(L).double()
    to_mu = torch.linalg.solve(M, W.T)  # (L, D): posterior mean M^-1 W^T (x - b), covariance sigma^2 M^-1
    variance = SIGMA**2 / M.diagonal()
    with torch.no_grad():
        model.decoder[0].weight.copy_(W)
        model.decoder[0].bias.copy_(b)
        model.encoder[1].weight.copy_(torch.cat((to_mu, torch.zeros_like(to_mu))))
        model.encoder[1].bias.copy_(torch.cat((-to_mu @ b, variance.log())))
    x = MultivariateNormal(b, W @ W.T + SIGMA**2 * torch.eye(SIDE**2).double()).sample((6,))
    exact = MultivariateNormal(b, W @ W.T + SIGMA**2 * torch.eye(SIDE**2).double()).log_prob(x)
    return model, x.view(-1, 1, SIDE, SIDE), exact


def exact_elbo(model, x, terms=None):
    """The expectation over z without sampling: the points +-sqrt(L) e_j integrate a loss quadratic in z exactly."""
    points = torch.cat((torch.eye(L), -torch.eye(L))).double() * L**0.5  # (2 L, L): mean 0, covariance I
    repeated, noise = x.repeat_interleave(2 * L, 0), points.repeat(len(x), 1)
    reconstruction, kl = (terms or model.elbo_terms)(repeated, noise)
    return -(reconstruction + kl).view(len(x), 2 * L).mean(1)


def test_elbo_at_the_exact_posterior_is_the_likelihood():
    model, x, exact = linear_vae()
    torch.testing.assert_close(exact_elbo(model, x), exact, rtol=1e-9, atol=1e-9)
    loss, n = model.loss(x.repeat_interleave(2 * L, 0), torch.cat((torch.eye(L), -torch.eye(L))).repeat(6, 1) * L**0.5)
    assert n == 24 and loss.item() / n == pytest.approx(-exact.mean().item(), rel=1e-6)  # the sign: lower is better
    torch.testing.assert_close(model.log_likelihood(x, 3), exact, rtol=1e-9, atol=1e-9)  # every weight is the same


def test_elbo_is_below_elsewhere():
    model, x, exact = linear_vae()
    encoder = model.encoder[1]
    start = [p.detach().clone() for p in encoder.parameters()]
    for _ in range(20):
        with torch.no_grad():
            for p, value in zip(encoder.parameters(), start, strict=True):
                p.copy_(value + 0.3 * torch.randn_like(value))
            gap = exact - exact_elbo(model, x)
            assert (gap > 1e-3).all()
            # The gap is KL(q || the exact posterior): another closed form.
            mu, logvar = model.encode(x)
            q = Independent(Normal(mu, (0.5 * logvar).exp()), 1)
            flat = x.flatten(1)
            exact_mu = flat @ start[0][:L].T + start[1][:L]
            posterior = Independent(Normal(exact_mu, (0.5 * start[1][L:]).exp().expand_as(exact_mu)), 1)
            torch.testing.assert_close(gap, kl_divergence(q, posterior), rtol=1e-9, atol=1e-9)


def test_samples_have_the_mean_and_covariance_of_the_model():
    """Means of p(x|z) at z ~ N(0, I): mean b, covariance W W^T, without the pixel noise sigma^2 I."""
    model, _, _ = linear_vae()
    W, b = model.decoder[0].weight, model.decoder[0].bias
    x = model.sample(100_000, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(x.mean(0), b.detach(), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(x.T), (W @ W.T).detach(), rtol=0, atol=0.03)


def test_log_likelihood_tightens_towards_the_truth():
    model, x, exact = linear_vae()
    with torch.no_grad():
        model.encoder[1].bias[L:] += 0.5  # q too wide: still it covers the posterior, so that the weights are tame
        model.encoder[1].bias[:L] += 0.3
    bounds = [torch.stack([model.log_likelihood(x, k) for _ in range(200)]).mean(0) for k in (1, 5, 50)]
    assert (bounds[0] < bounds[1]).all() and (bounds[1] < bounds[2]).all()
    assert (bounds[2] - exact).abs().max() < 0.05 < (bounds[0] - exact).abs().min()
    torch.testing.assert_close(bounds[0], exact_elbo(model, x), rtol=0, atol=0.5)  # K = 1 is the ELBO


def mean_over_latents(model):
    def terms(x, noise):
        mu, logvar = model.encode(x)
        return model._reconstruction(x, model.reparameterise(mu, logvar, noise)), gaussian_kl(mu, logvar).mean(1)

    return terms


def variance_for_sigma(model):
    def terms(x, noise):
        mu, logvar = model.encode(x)
        return model._reconstruction(x, mu + logvar.exp() * noise), gaussian_kl(mu, logvar).sum(1)

    return terms


def wrong_sign_of_kl(model):
    return lambda x, noise: [sign * term for sign, term in zip((1, -1), model.elbo_terms(x, noise), strict=True)]


def without_the_constant(model):
    constant = SIDE**2 * (math.log(SIGMA) + 0.5 * math.log(2 * math.pi))
    return lambda x, noise: [term - c for term, c in zip(model.elbo_terms(x, noise), (constant, 0), strict=True)]


def mean_over_pixels(model):
    return lambda x, noise: [t / d for t, d in zip(model.elbo_terms(x, noise), (SIDE**2, 1), strict=True)]


def at_the_mean(model):
    return lambda x, noise: model.elbo_terms(x, 0 * noise)


VARIANTS = [
    mean_over_latents,
    variance_for_sigma,
    wrong_sign_of_kl,
    without_the_constant,
    mean_over_pixels,
    at_the_mean,
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_check_rejects(variant):
    model, x, exact = linear_vae()
    wrong = exact_elbo(model, x, variant(model))
    assert not torch.allclose(wrong, exact, rtol=1e-3, atol=1e-3)


def test_training_finds_probabilistic_pca():
    """The maximum of the likelihood is known (Tipping & Bishop 1999, eq. 8): training must come near, never above."""
    torch.manual_seed(1)
    config = VAEConfig(image_size=SIDE, latent=L, hidden=(), reconstruction="mse", sigma=SIGMA)
    x = torch.randn(500, L) @ torch.randn(L, SIDE**2) + SIGMA * torch.randn(500, SIDE**2)
    covariance = torch.cov(x.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    W = vectors[:, -L:] * (values[-L:] - SIGMA**2).sqrt()
    best = MultivariateNormal(x.mean(0), W @ W.T + SIGMA**2 * torch.eye(SIDE**2)).log_prob(x).mean().item()
    model = VAE(config)
    optimizer = torch.optim.Adam(model.parameters())
    batch = x.view(-1, 1, SIDE, SIDE)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 600)
        loss, n = model.loss(batch)
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
    with torch.no_grad():
        elbo = -sum(model.loss(batch)[0].item() for _ in range(20)) / 20 / len(x)
    assert best - 0.1 < elbo < best + 0.02, (elbo, best)


# ----------------------------------------------------------------------------------------------- the loss and its sum


@given(st.sampled_from(KINDS), st.sampled_from(["bce", "mse"]), st.integers(0, 2**31), st.floats(0, 5), st.booleans())
def test_loss_against_torch_distributions(kind, reconstruction, seed, beta, variational):
    torch.manual_seed(seed)
    config = VAEConfig(latent=3, reconstruction=reconstruction, sigma=0.3, beta=beta, variational=variational, **kind)
    model, x, noise = VAE(config).double(), images(4, config).double(), torch.randn(4, 3).double()
    mu, logvar = model.encode(x)
    z = mu if logvar is None else mu + (0.5 * logvar).exp() * noise
    mean = model.decode(z)
    if reconstruction == "mse":
        expected = -Normal(mean, 0.3).log_prob(x).sum()
    else:
        expected = F.binary_cross_entropy(mean, x, reduction="sum")
    if variational:
        q = Normal(mu, (0.5 * logvar).exp())
        expected = expected + beta * kl_divergence(q, Normal(0.0, 1.0)).sum()
    loss, n = model.loss(x, noise)
    assert n == 4 and loss.dim() == 0
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert model.float().loss(x.float())[0].dtype == torch.float32
    assert model.bfloat16().loss(x.bfloat16())[0].dtype == torch.float32


@given(st.sampled_from(KINDS), st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_gradient_is_the_same_for_every_split(kind, sizes):
    """Trap 1: sums and counts over microbatches; the mean of means is rejected where their sizes differ."""
    config = VAEConfig(latent=3, **kind)
    torch.manual_seed(sum(sizes))
    model, x, noise = VAE(config).double(), images(sum(sizes), config).double(), torch.randn(sum(sizes), 3).double()

    def gradient(pieces, mean_of_means=False):
        model.zero_grad()
        total = 0
        for part, part_noise in pieces:
            loss, n = model.loss(part, part_noise)
            (loss / (n * len(pieces)) if mean_of_means else loss).backward()
            total += n
        scale = 1 if mean_of_means else total
        return torch.cat([p.grad.flatten() / scale for p in model.parameters()])

    whole = gradient([(x, noise)])
    pieces = list(zip(x.split(sizes), noise.split(sizes), strict=True))
    torch.testing.assert_close(gradient(pieces), whole, rtol=1e-9, atol=1e-12)
    if len(set(sizes)) > 1:
        assert not torch.allclose(gradient(pieces, mean_of_means=True), whole, rtol=1e-9, atol=1e-12)


def test_empty_batch_and_low_precision():
    model = VAE(VAEConfig())
    loss, n = model.loss(torch.zeros(0, 1, 8, 8))
    loss.backward()
    assert loss.item() == 0 and n == 0 and all(p.grad.abs().sum() == 0 for p in model.parameters())
    x = torch.rand(64, 1, 8, 8)
    exact, rough = model.elbo_terms(x)[0].mean(), VAE.elbo_terms(model.bfloat16(), x.bfloat16())[0].mean()
    assert rough.item() == pytest.approx(exact.item(), rel=5e-3)


@given(
    st.sampled_from(["mlp", "conv"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.lists(st.integers(1, 6), min_size=1, max_size=2),
    st.sampled_from(["bce", "mse"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_shapes(kind, quarter, channels, latent, hidden, reconstruction, variational, n):
    side = 4 * quarter + (1 if kind == "mlp" else 0)
    config = VAEConfig(side, channels, latent, tuple(hidden), kind, reconstruction, variational=variational)
    model, x = VAE(config), torch.rand(n, channels, side, side)
    mu, logvar = model.encode(x)
    assert mu.shape == (n, latent) and (logvar.shape == (n, latent) if variational else logvar is None)
    assert model(x).shape == model.decode(mu).shape == x.shape
    assert [term.shape for term in model.elbo_terms(x)] == [(n,), (n,)]
    assert model.interpolate(x[0], x[-1], 5).shape == (5, channels, side, side)
    if variational:
        assert model.sample(n).shape == x.shape and model.log_likelihood(x, 2).shape == (n,)
    if reconstruction == "bce":
        assert 0 <= model(x).min() and model(x).max() <= 1
    loss, _ = model.loss(x)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_deterministic_but_for_the_bound(kind):
    model = VAE(VAEConfig(latent=3, **kind))
    x = torch.rand(5, 1, 8, 8)
    assert not torch.equal(model(x), model(x))  # training: through a sample
    model.eval()
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), model.decode(model.encode(x)[0]))
    assert model.loss(x)[0] != model.loss(x)[0]  # the bound needs samples, always
    noise = torch.randn(5, 3)
    assert torch.equal(model.loss(x, noise)[0], model.loss(x, noise)[0])
    a, b = (model.sample(4, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, model.sample(4, torch.Generator().manual_seed(8)))
    assert not a.requires_grad and not torch.equal(model.sample(4), model.sample(4))
    plain = VAE(VAEConfig(latent=3, variational=False, **kind))
    assert torch.equal(plain(x), plain(x)) and plain.loss(x)[0] == plain.loss(x)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_latent_walk(kind):
    model = VAE(VAEConfig(latent=3, **kind)).eval()
    a, b = torch.rand(2, 1, 8, 8)
    walk = model.interpolate(a, b, 5)
    mu, _ = model.encode(torch.stack((a, b)))
    torch.testing.assert_close(walk[[0, 4]], model(torch.stack((a, b))))
    torch.testing.assert_close(walk[1:2], model.decode(0.75 * mu[:1] + 0.25 * mu[1:]))
    torch.testing.assert_close(walk.flip(0), model.interpolate(b, a, 5))


def learn(model, x, steps, lr=2e-3):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        loss, n = model.loss(x[torch.randint(len(x), (64,), generator=generator)])
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    x = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:1500], x[1500:]


@pytest.mark.parametrize(
    "share, least_kl, settings",
    [(0.4, 8, dict()), (0.4, 8, dict(kind="conv", hidden=(8, 16))), (0.7, 1.5, dict(reconstruction="bce"))],
)
def test_learns_digits(digits, share, least_kl, settings):
    """On images not trained on: a share of the error of the mean image, and a far better bound than at the start."""
    torch.manual_seed(0)
    train, test = digits
    model = VAE(VAEConfig(**settings))
    before = -sum(term.mean().item() for term in model.elbo_terms(test))
    learn(model, train, 600)
    with torch.no_grad():
        after = -sum(term.mean().item() for term in model.elbo_terms(test))
        of_the_mean = (train.mean(0) - test).square().mean().item()
        error = (model(test) - test).square().mean().item()
        _, kl = model.elbo_terms(test)
        likelihood = model.log_likelihood(test, 30).mean().item()
    assert error < share * of_the_mean, (error, of_the_mean)
    assert after > before + 10 and kl.mean() > least_kl  # the code is in use
    assert likelihood > after


def test_beta_trades_kl_for_reconstruction_and_the_autoencoder_reconstructs_best(digits):
    train, test = digits
    errors, kls = [], []
    for settings in (dict(variational=False), dict(beta=1.0), dict(beta=20.0)):
        torch.manual_seed(0)
        model = learn(VAE(VAEConfig(**settings)), train, 400)
        with torch.no_grad():
            errors.append((model(test) - test).square().mean().item())
            kls.append(model.elbo_terms(test)[1].mean().item())
    assert errors == sorted(errors), errors
    assert kls[0] == 0 and kls[1] > kls[2] > 0, kls


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("settings", [dict(), dict(kind="conv", hidden=(4,), channels=3, variational=False, beta=2.0)])
def test_saved_and_loaded_to_the_bit(settings, tmp_path):
    model = VAE(VAEConfig(**settings)).eval()
    model.save_pretrained(tmp_path / "new" / "folder")
    model.save_pretrained(tmp_path / "new" / "folder")  # over itself
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "vae"
    again = VAE.from_pretrained(folder)
    assert again.config == model.config and not again.training
    for (name, p), (other, q) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(p, q)
    x = images(3, model.config)
    assert torch.equal(model(x), again(x))


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    import safetensors.torch

    old = VAE(VAEConfig()).eval()
    old.save_pretrained(tmp_path)

    def fails(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fails)
        with pytest.raises(OSError, match="no space"):
            VAE(VAEConfig()).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(VAE.from_pretrained(tmp_path).encoder[1].weight, old.encoder[1].weight)


def broken(folder, **changes):
    VAE(VAEConfig()).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="gpt2"), r"config.json: model_type must be 'vae', got 'gpt2'$"),
        (dict(model_type=None), r"config.json: model_type must be 'vae', got None$"),
        (dict(latent=-1), r"config.json: latent must be a whole number >= 1, got -1$"),
        (dict(layers=3), r"config.json: .*unexpected keyword argument 'layers'$"),
        (dict(latent=4), r"model.safetensors: decoder.0.weight has shape \(64, 8\), wanted \(64, 4\)"),
        (dict(hidden=[128]), r"model.safetensors: .* has shape .*, wanted .*"),
    ],
)
def test_bad_folders(changes, message, tmp_path):
    broken(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        VAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_torn_files(tmp_path):
    with pytest.raises(ValueError, match="config.json: .*No such file"):
        VAE.from_pretrained(tmp_path)
    broken(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="model.safetensors: ") as error:
        VAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: .*No such file"):
        VAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: Expecting"):
        VAE.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------- grid and errors


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_grid_puts_every_image_in_its_cell(n, columns, channels, height, width):
    x = torch.rand(n, channels, height, width)
    picture = grid(x, columns)
    rows = math.ceil(n / columns)
    assert picture.shape == (channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    seen = torch.zeros(picture.shape[1:], dtype=torch.bool)
    for i in range(n):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        assert torch.equal(picture[:, top : top + height, left : left + width], x[i])
        seen[top : top + height, left : left + width] = True
    assert (picture[:, ~seen] == 0.5).all()
    assert grid(torch.tensor([[[[-3.0, 7.0]]]]), 1).tolist() == [[[0.0, 1.0]]]


CONFIGS = [
    (dict(image_size=0), "image_size must be a whole number >= 1, got 0"),
    (dict(latent=2.0), "latent must be a whole number >= 1, got 2.0"),
    (dict(channels=True), "channels must be a whole number >= 1, got True"),
    (dict(kind="cnn"), "kind must be 'mlp' or 'conv', got 'cnn'"),
    (dict(reconstruction="l2"), "reconstruction must be 'bce' or 'mse', got 'l2'"),
    (dict(sigma=0.0), "sigma must be a finite number > 0, got 0.0"),
    (dict(beta=math.nan), "beta must be a finite number >= 0, got nan"),
    (dict(beta="1"), "beta must be a finite number >= 0, got '1'"),
    (dict(hidden=(8, 0)), "hidden must be whole numbers >= 1 (one or more for 'conv'), got (8, 0)"),
    (dict(hidden=8), "hidden must be whole numbers >= 1 (one or more for 'conv'), got 8"),
    (dict(hidden=(), kind="conv"), "hidden must be whole numbers >= 1 (one or more for 'conv'), got ()"),
    (dict(image_size=10, kind="conv"), "image_size must be a multiple of 4 (halved per entry of hidden), got 10"),
    (dict(variational=1), "variational must be True or False, got 1"),
]


@pytest.mark.parametrize("settings, message", CONFIGS)
def test_config_errors(settings, message):
    with pytest.raises(ValueError) as error:
        VAEConfig(**settings)
    assert str(error.value) == message


def test_input_errors():
    model, plain, bernoulli = (VAE(VAEConfig(**s)) for s in ({}, {"variational": False}, {"reconstruction": "bce"}))
    x = torch.rand(2, 1, 8, 8)
    calls = [
        (lambda: model.loss(x[0]), ValueError, "x must have shape (N, 1, 8, 8), got (1, 8, 8)"),
        (lambda: model(torch.rand(2, 3, 8, 8)), ValueError, "x must have shape (N, 1, 8, 8), got (2, 3, 8, 8)"),
        (lambda: model(x.byte()), TypeError, "x must be floating point, got torch.uint8: divide bytes by 255"),
        (lambda: bernoulli(0 * x + 16), ValueError, "x must lie in [0, 1] for 'bce', got 16 ... 16"),
        (lambda: bernoulli(x * math.nan), ValueError, "x must lie in [0, 1] for 'bce', got nan ... nan"),
        (lambda: model.interpolate(x[0], x[1], 1), ValueError, "steps must be at least 2, got 1"),
        (lambda: model.log_likelihood(x, 0), ValueError, "samples must be at least 1, got 0"),
        (
            lambda: plain.sample(2),
            ValueError,
            "sample: an autoencoder (variational=False) has no distribution over codes",
        ),
        (
            lambda: plain.log_likelihood(x),
            ValueError,
            "log_likelihood: an autoencoder (variational=False) has no distribution over codes",
        ),
        (
            lambda: grid(x, 0),
            ValueError,
            "grid: wanted images (N, C, H, W) with N, columns >= 1, got (2, 1, 8, 8), 0",
        ),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind) as error:
            call()
        assert str(error.value) == message
    model.loss(3 * x)  # a Gaussian takes any number
