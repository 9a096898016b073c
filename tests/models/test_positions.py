"""Positions against slow formulas in float64: rotation and its scalings, sines, ALiBi's slopes."""

import dataclasses
import math

import pytest
import torch
from tests.models.small import normal, with_parts
from torch import Tensor

from llmtrain.config.schema import (
    DynamicScalingConfig,
    LinearScalingConfig,
    Llama3ScalingConfig,
    ModelConfig,
    YarnScalingConfig,
)
from llmtrain.models.positions import alibi_slopes, rotary_tables, rotate, rotated_size, sinusoids


def turned(head: Tensor, angles: list[float]) -> Tensor:
    """Each pair (x_d, x_d+R/2) by the matrix [[cos, -sin], [sin, cos]]; what is behind R stays."""
    found, half = head.clone(), len(angles)
    for d, angle in enumerate(angles):
        matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
        found[[d, d + half]] = matrix @ head[[d, d + half]]
    return found


SCALINGS = {
    "plain": (None, lambda theta, d, size: theta ** (-2 * d / size)),
    "linear": (LinearScalingConfig(factor=3.0), lambda theta, d, size: theta ** (-2 * d / size) / 3.0),
    "dynamic": (
        DynamicScalingConfig(factor=3.0, original_max_sequence_length=10),
        lambda theta, d, size: (theta * (3.0 * 40 / 10 - 2.0) ** (size / (size - 2))) ** (-2 * d / size),
    ),
}


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_is_that_of_pairs(name: str, share: float) -> None:
    scaling, frequency = SCALINGS[name]
    config = with_parts(head_dim=16, rope_theta=70.0, rope_scaling=scaling, partial_rotary_factor=share)
    size, heads = rotated_size(config), normal(1, 40, 2, 16)
    found = rotate(heads, rotary_tables(config, torch.arange(40)[None], lengths=40))
    for position in (0, 1, 7, 39):
        angles = [position * frequency(70.0, d, size) for d in range(size // 2)]
        for head in range(2):
            expected = turned(heads[0, position, head], angles)
            torch.testing.assert_close(found[0, position, head], expected, atol=1e-5, rtol=0)


def test_dynamic_scaling_begins_beyond_the_trained_length_and_goes_by_each_row() -> None:
    plain = with_parts(head_dim=16)
    config = with_parts(head_dim=16, rope_scaling=DynamicScalingConfig(factor=4.0, original_max_sequence_length=32))
    positions = torch.arange(20)[None]
    together = rotary_tables(config, positions, lengths=torch.tensor([20, 32, 50]))[0]
    for row, length in enumerate((20, 32, 50)):
        torch.testing.assert_close(together[row], rotary_tables(config, positions, lengths=length)[0][0])
    torch.testing.assert_close(together[0], rotary_tables(plain, positions)[0][0])
    torch.testing.assert_close(together[1], together[0])
    assert not torch.allclose(together[2], together[0])


def frequencies(config: ModelConfig) -> Tensor:
    """From the angles at position 1, which are below π."""
    cosines, sines = rotary_tables(config, torch.tensor([[1]]))
    half = cosines.shape[-1] // 2
    return torch.atan2(-sines[0, 0, 0, :half], cosines[0, 0, 0, :half]).double()


def test_llama3_scaling_by_wave_length() -> None:
    scaling = Llama3ScalingConfig(
        factor=8.0, original_max_sequence_length=512, low_freq_factor=1.0, high_freq_factor=4.0
    )
    config = with_parts(head_dim=64, rope_theta=5000.0, rope_scaling=scaling)
    kinds = set()
    for d, found in enumerate(frequencies(config).tolist()):
        plain = 5000.0 ** (-2 * d / 64)
        wave = 2 * math.pi / plain
        kind = "long" if wave > 512 / 1.0 else "short" if wave < 512 / 4.0 else "between"
        smooth = (512 / wave - 1.0) / (4.0 - 1.0)
        expected = {"long": plain / 8, "short": plain, "between": (1 - smooth) * plain / 8 + smooth * plain}[kind]
        assert found == pytest.approx(expected, rel=1e-5)
        kinds.add(kind)
    assert kinds == {"long", "short", "between"}


def test_yarn_by_number_of_turns() -> None:
    """Pairs that turn often keep their frequency, rare ones get 1 / factor; queries and keys grow by 1 + ln(s) / 10."""
    scaling = YarnScalingConfig(factor=4.0, original_max_sequence_length=256, beta_fast=16.0, beta_slow=2.0)
    config = with_parts(head_dim=64, rope_theta=5000.0, rope_scaling=scaling)

    def pair(turns: float) -> float:  # the d for which 256 theta^(-2d/64) / 2π is the number of turns
        return 64 * math.log(256 / (turns * 2 * math.pi)) / (2 * math.log(5000.0))

    first, last = math.floor(pair(16.0)), math.ceil(pair(2.0))
    assert 0 < first < last < 31
    for d, found in enumerate(frequencies(config).tolist()):
        plain, ramp = 5000.0 ** (-2 * d / 64), min(max((d - first) / (last - first), 0.0), 1.0)
        assert found == pytest.approx(ramp * plain / 4.0 + (1 - ramp) * plain, rel=1e-5)
    cosines, sines = rotary_tables(config, torch.tensor([[3]]))
    grown = (cosines.square() + sines.square()).sqrt()
    torch.testing.assert_close(grown, torch.full_like(grown, 1 + 0.1 * math.log(4.0)))
    given = dataclasses.replace(scaling, attention_factor=1.5)
    cosines, sines = rotary_tables(dataclasses.replace(config, rope_scaling=given), torch.tensor([[3]]))
    torch.testing.assert_close((cosines.square() + sines.square()).sqrt(), torch.full_like(grown, 1.5))


@pytest.mark.parametrize("name", SCALINGS)
def test_scores_depend_on_distance_alone(name: str) -> None:
    config = with_parts(head_dim=16, rope_theta=70.0, rope_scaling=SCALINGS[name][0], partial_rotary_factor=0.5)
    tables = rotary_tables(config, torch.arange(40)[None], lengths=40)
    query, key = (rotate(normal(1, 1, 1, 16, seed=seed).expand(1, 40, 1, 16), tables)[0, :, 0] for seed in (1, 2))
    scores = query @ key.T
    for distance in (0, 1, 5, 20):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert (scores[30, 30] - scores[30, 25]).abs() > 1e-2


def test_local_layers_have_their_own_base() -> None:
    plain = with_parts(rope_theta=1000.0, rope_scaling=LinearScalingConfig(factor=2.0))
    config = dataclasses.replace(plain, rope_local_theta=10.0, sliding_window=4)
    positions = torch.arange(9)[None]
    local, own = rotary_tables(config, positions, window=4), rotary_tables(with_parts(rope_theta=10.0), positions)
    torch.testing.assert_close(local, own)
    torch.testing.assert_close(rotary_tables(config, positions), rotary_tables(plain, positions))


# Other positions


def test_sinusoids() -> None:
    found = sinusoids(torch.tensor([[0, 3, 100]]), 8)
    for column, position in enumerate((0, 3, 100)):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            expected = [math.sin(angle), math.cos(angle)]
            torch.testing.assert_close(found[0, column, 2 * i : 2 * i + 2], torch.tensor(expected))


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16) == pytest.approx([2.0 ** (-i / 2) for i in range(1, 17)])
    # 12 heads: those of 8, then every second of 16's, as the authors' get_slopes gives them
    assert alibi_slopes(12) == pytest.approx([*alibi_slopes(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert alibi_slopes(1) == [2.0**-8]
