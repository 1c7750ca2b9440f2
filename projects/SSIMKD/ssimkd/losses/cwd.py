"""CWD: each channel is compared as a distribution over cells (Shu et al., ICCV 2021)."""

import torch.nn.functional as F
from torch import Tensor

from ssimkd.registry import register_loss
from ssimkd.utils.validate import check_positive

from .base import MapLoss


@register_loss("cwd")
class CWDLoss(MapLoss):
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) per level, averaged over images and channels.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021. The softmax
    is taken over the cells of a channel that belong to the image. The features are raw: an offset
    of a channel does not matter, its scale does. For a large tau the loss approaches half the
    variance of T - S.

    Args:
        weight (float): lambda.
        tau (float): temperature, in feature units.
    """

    def __init__(
        self,
        # [MMRazor: on p2 to p6]; the code that the authors link to has 5 on RetinaNet's p3 to p6
        weight: float = 10.0,
        tau: float = 1.0,  # [authors]
    ) -> None:
        super().__init__(weight, normalize="none", normalize_scope="image")
        check_positive(tau=tau)
        self.tau = float(tau)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar >= 0 for (n, C, h, w) maps."""
        n, channels = student.shape[:2]
        s, t = (F.log_softmax(x.flatten(2) / self.tau, dim=2) for x in (student, teacher))
        divergence = F.kl_div(s, t, reduction="sum", log_target=True)
        return self.tau**2 * divergence / (n * channels)
