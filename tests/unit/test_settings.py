import pytest

from engine.errors import UsageError
from engine.settings import ScaleRange, Settings, parse_scale, validated


def test_settings_survive_json():
    settings = Settings(cfg_scale=ScaleRange(1.0, 4.0), restore_pull=4.0, prompt="Straßenszene, 猫")
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"sampler": "ddim"}, "sampler"),
        ({"upscale": 0}, "upscale"),
        ({"upscale": float("nan")}, "upscale"),
        ({"cfg_scale": (float("inf"), 1.0)}, "cfg_scale"),
        ({"restore_pull": 0.0}, "restore_pull"),
        ({"churn": -1.0}, "churn"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"color_fix": "yes"}, "color_fix"),
        ({"tile": "on"}, "tile"),
        ({"tile": 8}, "tile"),
        ({"vae_tiles": "slow"}, "vae_tiles"),
        ({"stpes": 4}, "stpes"),
    ],
)
def test_impossible_settings_are_named(change, place):
    with pytest.raises(UsageError, match=rf"impossible settings\n.*{place}"):
        Settings().updated(change)


def test_several_problems_are_told_at_once():
    with pytest.raises(UsageError, match=r"(?s)steps.*seed"):
        validated({"steps": 0, "seed": -1})


def test_updating_changes_nothing_else():
    settings = Settings(prompt="a cup")
    assert settings.updated({"steps": 4}) == Settings(prompt="a cup", steps=4)


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1:4", (1, 4)), ("-1:0.5", (-1, 0.5)), ("0", (0, 0))])
def test_scales_are_one_or_two_numbers(text, expected):
    assert parse_scale(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1:2:3", "1:", ":2"])
def test_other_scales_are_refused(text):
    with pytest.raises(ValueError, match=r"could not convert|expected S or S:END"):
        parse_scale(text)
