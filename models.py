"""The scale-invariant networks, and which of their parameters live on which sphere.

Every convolution is followed by a BatchNorm without affine parameters, and the last linear layer is fixed, so the whole
function depends on the directions of the convolutions' weights alone:

    net = convnet(channels=3, classes=10, width=32)
    net.layer_groups        # [["conv1.weight"], ...]: the minimal sets that are scale invariant, each by itself
"""

from collections import OrderedDict

import torch
from torch import nn

# BatchNorm divides by sqrt(variance + eps), which is not quite scale invariant: ten times a layer's weights changes the logits
# by 5e-5 at initialization with torch's default of 1e-5 (float64, relative), by 5e-8 with this.
EPS = 1e-8


def convnet(channels: int, classes: int, width: int = 8) -> nn.Sequential:
    """The plain network of the paper (arXiv 2209.03695, appendix A): [N, channels, H, W] → [N, classes], H and W at least 8.

    3×3 convolutions channels → k → 2k → 4k → 8k without bias, each with BatchNorm and ReLU; a 2×2 max-pool after the second,
    third and fourth, a global max-pool and a fixed linear layer.
    """
    layers, before = OrderedDict(), channels
    for i in range(4):
        after = width * 2**i
        layers[f"conv{i + 1}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{i + 1}"] = nn.BatchNorm2d(after, affine=False, eps=EPS)
        layers[f"relu{i + 1}"] = nn.ReLU()
        if i > 0:
            layers[f"pool{i + 1}"] = nn.MaxPool2d(2)
        before = after
    layers["global_pool"] = nn.AdaptiveMaxPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = fixed_head(nn.Linear(before, classes))
    net = nn.Sequential(layers)
    net.layer_groups = [[f"conv{i + 1}.weight"] for i in range(4)]
    return net


def fixed_head(head: nn.Linear, norm: float = 10.0) -> nn.Linear:
    """The last layer at its random initialization, its weight rescaled to the given Frobenius norm, not trained."""
    with torch.no_grad():
        head.weight.mul_(norm / head.weight.norm())
    return head.requires_grad_(False)


MODELS = {"convnet": convnet}
