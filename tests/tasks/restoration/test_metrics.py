"""PSNR and SSIM beside scikit-image and torchmetrics, and their conventions by hand."""

import math

import numpy as np
import pytest
import torch

from tasks.restoration.images import read_picture
from tasks.restoration.metrics import luma, psnr, ssim
from visionlora.errors import ConfigError, DataError


def pictures(height=40, width=52):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    clean = 127 + 80 * np.sin(np.stack([x / 5, y / 7, (x + y) / 6], axis=2))
    noisy = clean + rng.normal(0, 15, clean.shape)
    return clean.astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


def peers(one, other):
    """Return PSNR and SSIM by scikit-image, SSIM without its border."""
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    structure, full = skimage.structural_similarity(
        one,
        other,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    del structure
    return skimage.peak_signal_noise_ratio(one, other, data_range=255), full[5:-5, 5:-5].mean()


def test_figures_agree_with_scikit_image():
    clean, noisy = pictures()
    wanted = peers(clean, noisy)
    assert abs(psnr(clean, noisy) - wanted[0]) < 1e-9
    assert abs(ssim(clean, noisy) - wanted[1]) < 1e-4


def test_figures_agree_with_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.image")
    clean, noisy = pictures()
    tensors = [torch.from_numpy(p).permute(2, 0, 1)[None].double() for p in (clean, noisy)]
    ratio = metrics.peak_signal_noise_ratio(*tensors, data_range=255.0)
    assert abs(psnr(clean, noisy) - float(ratio)) < 1e-4
    _, full = metrics.structural_similarity_index_measure(
        *tensors, data_range=255.0, sigma=1.5, return_full_image=True
    )
    # Its mean is over the mirrored border too.
    assert abs(ssim(clean, noisy) - float(full[..., 5:-5, 5:-5].mean())) < 1e-4


@pytest.mark.data
def test_figures_agree_with_peers_on_real_pairs(restoration_data):
    for file in sorted((restoration_data / "CC15" / "input").iterdir())[:2]:
        noisy = read_picture(file).levels[:200, :240]
        clean = read_picture(restoration_data / "CC15" / "target" / file.name).levels[:200, :240]
        wanted = peers(clean, noisy)
        assert abs(psnr(clean, noisy) - wanted[0]) < 1e-9
        assert abs(ssim(clean, noisy) - wanted[1]) < 1e-4


def test_luma_is_matlabs():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0]]], np.uint8)
    assert luma(colours).tolist() == [[16, 235, 81, 145]]


def test_a_grey_shift_by_hand():
    clean = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(clean, clean + np.uint8(1)) == pytest.approx(20 * math.log10(255))
    # 101/255 of the luma range rounds to 103 where 100 is 102: one level again.
    assert psnr(clean, clean + np.uint8(1), "y") == pytest.approx(20 * math.log10(255))


def test_colour_errors_count_less_in_luma():
    clean, _ = pictures()
    tinted = clean.copy()
    tinted[..., 2] += 20
    assert psnr(clean, tinted, "y") > psnr(clean, tinted) + 5


def test_a_border_can_be_left_out():
    clean, _ = pictures()
    damaged = clean.copy()
    damaged[:3], damaged[-3:], damaged[:, :3], damaged[:, -3:] = 0, 0, 0, 0
    assert psnr(clean, damaged) < 20
    assert psnr(clean, damaged, crop=3) == math.inf
    assert ssim(clean, damaged, crop=3) == pytest.approx(1)


def test_dark_pictures_are_measured_in_the_same_range():
    one = np.zeros((16, 16, 3), np.uint8)
    assert psnr(one, one + np.uint8(1)) == pytest.approx(48.1308, abs=1e-3)


def test_what_cannot_be_compared_is_refused():
    clean, _ = pictures()
    with pytest.raises(DataError, match="52 x 40 and 51 x 40"):
        psnr(clean, clean[:, 1:])
    with pytest.raises(DataError, match="whole picture"):
        psnr(clean, clean, crop=20)
    with pytest.raises(DataError, match="11 x 11"):
        ssim(clean[:10], clean[:10])
    with pytest.raises(DataError, match="8 bits"):
        psnr(clean / 255, clean)
    with pytest.raises(ConfigError, match="negative"):
        psnr(clean, clean, crop=-1)
