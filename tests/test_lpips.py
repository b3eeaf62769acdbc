"""LPIPS in its published format, on a random backbone, against the arithmetic written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import pipeline_run, tiny_config

from raftdiff.checkpoint import Checkpoints
from raftdiff.errors import ConfigError, WeightsError
from raftdiff.evaluation import diversity
from raftdiff.reward_models.lpips import BACKBONE, HEADS, Lpips
from raftdiff.rounds import run_rounds
from raftdiff.store import SampleStore
from raftdiff.types import Prompt, Sample

# AlexNet's convolutions (Krizhevsky 2014) by their place in torchvision's file: channels in and out, kernel, stride,
# padding, and whether a maximum over 3x3 in steps of 2 is taken before them.
CONVOLUTIONS = {
    0: (3, 64, 11, 4, 2, False),
    3: (64, 192, 5, 1, 2, True),
    6: (192, 384, 3, 1, 1, True),
    8: (384, 256, 3, 1, 1, False),
    10: (256, 256, 3, 1, 1, False),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with the two files."""
    folder = tmp_path_factory.mktemp("lpips")
    random = torch.Generator().manual_seed(0)
    backbone = {"classifier.6.weight": torch.ones(2, 2)}
    for layer, (channels, out, side, *_) in CONVOLUTIONS.items():
        scale = (channels * side * side) ** -0.5
        backbone[f"features.{layer}.weight"] = scale * torch.randn(out, channels, side, side, generator=random)
        backbone[f"features.{layer}.bias"] = scale * torch.randn(out, generator=random)
    widths = [out for _, out, *_ in CONVOLUTIONS.values()]
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=random) for i, width in enumerate(widths)}
    torch.save(backbone, folder / BACKBONE)
    torch.save(heads, folder / HEADS)
    return folder


def sample(seed: int, height: int = 48, width: int = 40) -> Sample:
    pixels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return Sample(id=str(seed), prompt=Prompt(text="a"), seed=seed, image=pixels.to(torch.uint8))


def written_out(folder: Path, one: Sample, other: Sample) -> float:
    """The distance of two pictures."""
    backbone, heads = torch.load(folder / BACKBONE), torch.load(folder / HEADS)
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    maps = []
    for image in (one.image, other.image):
        x = (image.numpy().astype(np.float64) / 255 * 2 - 1 - shift[:, None, None]) / scale[:, None, None]
        x = torch.from_numpy(x)[None]
        layers = []
        for layer, (*_, stride, padding, pooled) in CONVOLUTIONS.items():
            if pooled:
                x = F.max_pool2d(x, 3, 2)
            weight, bias = (backbone[f"features.{layer}.{part}"].double() for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
            layers.append(x[0].numpy())
        maps.append(layers)
    total = 0.0
    for i, (a, b) in enumerate(zip(*maps, strict=True)):
        a, b = (m / (np.sqrt((m**2).sum(axis=0)) + 1e-10) for m in (a, b))
        weights = heads[f"lin{i}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += (weights * (a - b) ** 2).sum(axis=0).mean()
    return total


def test_diversity_is_the_mean_lpips_of_all_pairs_of_a_prompt(published):
    samples = [sample(seed) for seed in range(3)]
    pairs = [written_out(published, samples[i], samples[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    group, lone, same = diversity([samples, samples[:1], [samples[0], samples[0]]], Lpips(published))
    assert group == pytest.approx(np.mean(pairs), rel=1e-5) and min(pairs) > 0.01
    assert np.isnan(lone) and same == 0


def test_more_pictures_than_fit_into_a_batch_are_each_as_alone(published):
    lpips, samples = Lpips(published), [sample(seed, 33, 65) for seed in range(9)]
    assert lpips(samples).numpy() == pytest.approx(torch.cat([lpips([one]) for one in samples]).numpy(), abs=1e-6)


def test_a_run_measures_diversity_by_it_and_records_the_files(published, tmp_path):
    config = tiny_config(
        tmp_path,
        rounds=1,
        model={"height": 32, "width": 32},
        evaluation={"seeds_per_prompt": 2, "lpips": str(published)},
    )
    result = run_rounds(pipeline_run(config))
    groups: dict[str, list[Sample]] = {}
    for one in SampleStore(config.folder / "evaluation" / "guidance-1").read_samples(0):
        groups.setdefault(one.prompt.id, []).append(one)
    expected = np.mean([written_out(published, *pair) for pair in groups.values()])
    assert result.base[0].metrics["diversity"].mean == pytest.approx(expected, rel=1e-4)
    found, _ = Checkpoints(config.folder / "checkpoints").newest()
    assert found.meta["diversity"].startswith(f"{published / BACKBONE} (sha256 ")


def refused(words: str, folder: Path) -> None:
    with pytest.raises(WeightsError, match=words) as raised:
        Lpips(folder)
    assert "\n" not in str(raised.value)


def test_files_that_are_missing_or_others_are_refused_in_one_line(published, tmp_path):
    refused(f"has no {BACKBONE}; download it", tmp_path)
    refused("no weights at .*nowhere", tmp_path / "nowhere")
    (tmp_path / BACKBONE).write_bytes((published / BACKBONE).read_bytes())
    refused(f"has no {HEADS}; download it", tmp_path)
    heads = torch.load(published / HEADS)
    torch.save(heads | {"lin1.model.1.weight": torch.ones(1, 64, 1, 1)}, tmp_path / HEADS)
    refused("holds other weights than those of LPIPS", tmp_path)
    torch.save(heads | {"lin1.model.1.weight": -heads["lin1.model.1.weight"]}, tmp_path / HEADS)
    refused("holds negative weights", tmp_path)
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, tmp_path / BACKBONE)
    refused("is not torchvision's AlexNet: .*Missing key", tmp_path)


def test_pictures_that_are_too_small_are_refused(published):
    with pytest.raises(ConfigError, match="at least 32 pixels: leave out evaluation.lpips"):
        Lpips(published)([sample(0, 31, 64)])
