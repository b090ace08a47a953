"""Privacy: updates are clipped to the ball and noised as stated, and the accountant's ε is that of the theory."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from scipy import integrate, optimize, stats

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.privacy import PrivacySettings, composed, delta_of, epsilon_of, normal, privatize, update_norm


def adapter(value: float, *, rank: int = 2, width: int = 3) -> Adapter:
    """All entries are `value`; two modules of rank · (3 + 3) entries each."""
    factors = LoraFactors(torch.full((rank, width), value), torch.full((width, rank), value), 2.0)
    return Adapter({"a": factors, "b": factors})


def noiseless(update: Adapter, reference: Adapter, clip: float) -> tuple[Adapter, bool]:
    private = privatize(update, reference, clip=clip, noise_multiplier=1e-12)
    return private.adapter, private.clipped


# --- clipping ----------------------------------------------------------------------------------------------------------


def test_the_norm_is_over_all_entries_of_the_difference_to_the_reference() -> None:
    assert update_norm(adapter(1.5), adapter(1.0)) == pytest.approx(0.5 * math.sqrt(24))


def test_a_short_update_stays_and_a_long_one_is_cut_to_the_clipping_norm() -> None:
    reference = adapter(1.0)
    kept, clipped = noiseless(adapter(1.5), reference, clip=3.0)
    assert not clipped
    assert torch.allclose(kept["a"].A, torch.full((2, 3), 1.5))
    cut, clipped = noiseless(adapter(5.0), reference, clip=3.0)
    assert clipped
    assert update_norm(cut, reference) == pytest.approx(3.0, rel=1e-6)
    assert torch.allclose(cut["b"].B, torch.full((3, 2), 1.0 + 3.0 / math.sqrt(24)))
    assert cut["a"].scaling == 2.0


def test_two_opposite_updates_are_at_most_two_clipping_norms_apart() -> None:
    reference = adapter(0.0)
    one, other = noiseless(adapter(9.0), reference, 1.0)[0], noiseless(adapter(-9.0), reference, 1.0)[0]
    assert update_norm(one, other) == pytest.approx(2.0, rel=1e-6)


def test_inputs_are_not_changed_and_the_dtype_is_kept() -> None:
    update, reference = adapter(5.0).map(lambda f: f.to(dtype=torch.bfloat16)), adapter(0.0)
    private = privatize(update, reference, clip=1.0, noise_multiplier=1.0)
    assert update["a"].A.eq(5.0).all()
    assert reference["a"].A.eq(0.0).all()
    assert private.adapter["a"].A.dtype == torch.bfloat16


def test_a_reference_of_another_shape_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="expected rank 2, got 1"):
        privatize(adapter(1.0, rank=1), adapter(1.0), clip=1.0, noise_multiplier=1.0)


# --- noise -------------------------------------------------------------------------------------------------------------


def test_the_noise_is_gaussian_with_the_stated_deviation_in_every_factor() -> None:
    big = adapter(0.0, rank=50, width=400)
    private = privatize(big, big, clip=3.0, noise_multiplier=2.0, generator=torch.Generator().manual_seed(0))
    entries = torch.cat([t.flatten() for f in private.adapter.values() for t in (f.A, f.B)]).numpy()
    assert stats.kstest(entries, "norm", args=(0.0, 6.0)).pvalue > 0.01
    assert not torch.equal(private.adapter["a"].A, private.adapter["b"].A)


def test_the_secure_source_is_standard_normal_and_never_the_same() -> None:
    drawn = normal(torch.Size((200_000,))).numpy()
    # One in a million draws of a right source fails this.
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    assert abs(drawn.std() - 1) < 0.01
    assert not torch.equal(normal(torch.Size((8,))), normal(torch.Size((8,))))


def test_a_seed_gives_the_same_noise_again() -> None:
    def once() -> Adapter:
        made = torch.Generator().manual_seed(7)
        return privatize(adapter(1.0), adapter(0.0), clip=1.0, noise_multiplier=1.0, generator=made).adapter

    assert torch.equal(once()["a"].A, once()["a"].A)


# --- the accountant ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "mu"), [(0.0, 1.0), (0.5, 0.3), (1.0, 1.0), (4.0, 2.0), (10.0, 2.5)])
def test_delta_is_the_excess_of_one_gaussian_over_the_other(epsilon: float, mu: float) -> None:
    """δ(ε) = ∫ max(0, p - e^ε q) of N(μ, 1) against N(0, 1), which is the definition."""

    def excess(x: float) -> float:
        return max(0.0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))

    edge = epsilon / mu + mu / 2  # where the two are equal
    integral, _ = integrate.quad(excess, edge, edge + 30, epsabs=1e-15)
    assert delta_of(epsilon, mu) == pytest.approx(integral, rel=1e-6)


def test_without_epsilon_delta_is_the_total_variation() -> None:
    assert delta_of(0.0, 1.0) == pytest.approx(2 * stats.norm.cdf(0.5) - 1)


@pytest.mark.parametrize(("mu", "delta"), [(0.1, 1e-5), (1.0, 1e-5), (2.0, 1e-6), (8.0, 1e-9), (40.0, 1e-5)])
def test_epsilon_is_the_root_of_delta_and_never_below_it(mu: float, delta: float) -> None:
    epsilon = epsilon_of(mu, delta)
    root = optimize.brentq(
        lambda e: stats.norm.cdf(mu / 2 - e / mu) - math.exp(e + stats.norm.logcdf(-mu / 2 - e / mu)) - delta,
        0.0,
        mu * mu + 20 * mu,
        xtol=1e-12,
    )
    assert epsilon == pytest.approx(root, rel=1e-5)
    assert delta_of(epsilon, mu) <= delta


def test_the_exact_epsilon_is_below_the_classical_bound() -> None:
    """Dwork & Roth, Theorem A.1: σ = sqrt(2 ln(1.25/δ)) / ε suffices for ε < 1."""
    delta, epsilon = 1e-5, 0.9
    sigma = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    assert 0.5 * epsilon < epsilon_of(1 / sigma, delta) < epsilon


def test_four_releases_cost_as_much_as_one_with_half_the_noise() -> None:
    assert composed([8.0] * 4) == pytest.approx(composed([4.0]))
    assert composed([]) == 0.0
    assert epsilon_of(composed([]), 1e-5) == 0.0
    assert epsilon_of(composed([8.0, 8.0]), 1e-5) > epsilon_of(composed([8.0]), 1e-5)


def test_one_release_is_counted_with_both_ends_of_the_ball() -> None:
    """Two clipped updates differ by 2C; with σ = 4 that is a shift of half a deviation."""
    assert composed([4.0]) == 0.5


def test_much_noise_costs_nothing_and_next_to_none_is_refused() -> None:
    assert epsilon_of(composed([1e9]), 1e-5) == 0.0
    with pytest.raises(ConfigError, match="protects nothing"):
        epsilon_of(composed([1e-6]), 1e-5)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"noise_multiplier": 0.0}, {"delta": 0.0}, {"delta": 1.0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PrivacySettings.model_validate({"clip": 1.0, "noise_multiplier": 1.0, **wrong})


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"noise_multiplier": 1e-6}, "protects nothing"),
        ({"noise_multiplier": 1e-300}, "protects nothing"),
        ({"noise_multiplier": float("inf")}, "leaves nothing"),
        ({"clip": 1e300, "noise_multiplier": 1e300}, "leaves nothing"),
    ],
)
def test_too_little_and_too_much_noise_are_refused_before_a_training_spends_hours(
    wrong: dict[str, float], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        PrivacySettings.model_validate({"clip": 1.0, "noise_multiplier": 1.0, **wrong})
