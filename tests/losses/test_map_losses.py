"""L1, L2 and SSIM on maps; that the normalisations reach them."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import batch
from ssimkd.losses import L1Loss, L2Loss, SSIMLoss
from ssimkd.ssim import ssim_loss
from ssimkd.ssim.normalize import NORMALIZATIONS, SCOPES, normalize_maps


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("loss", "known"), [(L1Loss, F.l1_loss), (L2Loss, F.mse_loss)])
def test_whole_images_reduce_to_torchs_loss_of_normalised_maps(loss, known, normalize, scope):
    student, teacher, context = batch([(64, 96)] * 2)
    found = loss(normalize=normalize, normalize_scope=scope)(student, teacher, context)
    for level, value in found.items():
        maps = normalize_maps(student[level], teacher[level], normalize, scope, None)
        torch.testing.assert_close(value, known(*maps))


def test_the_ssim_loss_hands_its_options_on():
    student, teacher, context = batch()
    s, t, sizes = student["p3"], teacher["p3"], context.cells("p3", student["p3"])
    options = dict(window_size=3, sigma=0.7, k1=0.5, k2=0.4, exponents=[0.0, 1.0, 2.0])
    options |= dict(border="reflect", normalize="standardize", normalize_scope="image")
    for option, value in {**options, "backend": "definition"}.items():
        loss = SSIMLoss(**{option: value})(student, teacher, context)["p3"]
        known = ssim_loss(s, t, **{"normalize": "minmax", "sizes": sizes, option: value})
        torch.testing.assert_close(loss, known)
        default = SSIMLoss()(student, teacher, context)["p3"]
        assert option == "backend" or abs(loss - default) > 1e-6
