"""The networks. All their weights are scale invariant but the last layer's, which is fixed: each
stands before a normalization without parameters.

    net = convnet(channels=3, classes=10, width=32)
    net.layer_groups        # [["conv1.weight"], ...]: the minimal sets that are scale invariant
"""

import inspect
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# Ten times a layer's weights changes the logits by 5e-8 with this, by 5e-5 with torch's 1e-5.
EPS = 1e-8


def convnet(channels, classes, width=8, affine=False, train_head=False):
    """The plain network of the paper (arXiv 2209.03695, appendix A), [N, channels, H, W] →
    [N, classes], H and W at least 8.

    3×3 convolutions to k, 2k, 4k, 8k channels, each with BatchNorm and ReLU; a 2×2 max-pool after
    the last three, a global max-pool and a fixed linear layer.
    """
    layers, before = OrderedDict(), channels
    for i in range(4):
        after = width * 2**i
        layers[f"conv{i + 1}"] = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers[f"norm{i + 1}"] = nn.BatchNorm2d(after, affine=affine, eps=EPS)
        layers[f"relu{i + 1}"] = nn.ReLU()
        if i > 0:
            layers[f"pool{i + 1}"] = nn.MaxPool2d(2)
        before = after
    layers["global_pool"] = nn.AdaptiveMaxPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = fixed_head(nn.Linear(before, classes)).requires_grad_(train_head)
    net = nn.Sequential(layers)
    net.layer_groups = [[f"conv{i + 1}.weight"] for i in range(4)]
    return net.to(memory_format=torch.channels_last)  # which convolutions like best


def fixed_head(head, norm=10.0):
    """The last layer, not trained, its weight scaled to this Frobenius norm."""
    with torch.no_grad():
        head.weight.mul_(norm / head.weight.norm())
    return head.requires_grad_(False)


class PreActivationBlock(nn.Module):
    """norm → ReLU → 3×3 convolution, twice, added to the input. Where the shape changes, BatchNorm
    and a 1×1 convolution of the first activation take its place."""

    def __init__(self, before, after, stride, affine):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before, affine=affine, eps=EPS)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after, affine=affine, eps=EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or before != after:
            norm = nn.BatchNorm2d(before, affine=affine, eps=EPS)
            self.shortcut = nn.Sequential(norm, nn.Conv2d(before, after, 1, bias=False))
        self.stride = stride

    def forward(self, x):
        h = F.relu(self.norm1(x))
        if self.shortcut is not None:
            norm, conv = self.shortcut
            # A strided convolution would do the same, but oneDNN may compute its gradient wrong:
            # github.com/uxlfoundation/oneDNN/issues/6035 (1×1, stride above 1, few channels)
            x = conv(norm(h)[:, :, :: self.stride, :: self.stride])
        h = F.relu(self.norm2(self.conv1(h)))
        return x + self.conv2(h)


def resnet18(channels, classes, width=8, affine=False, train_head=False):
    """Pre-activation ResNet-18 of width k for small images, [N, channels, H, W] → [N, classes].

    3×3 stem, stages k, 2k, 4k, 8k of two blocks with strides 1, 2, 2, 2, final BatchNorm, ReLU,
    global average pool and a fixed linear layer without bias. The tensors that write to one
    residual stream are only jointly scale invariant.
    """
    layers = OrderedDict(stem=nn.Conv2d(channels, width, 3, padding=1, bias=False))
    before, groups, stream = width, [], ["stem.weight"]
    for stage in range(4):
        after = width * 2**stage
        for block in range(2):
            name = f"stage{stage + 1}_block{block + 1}"
            stride = 2 if stage > 0 and block == 0 else 1
            layers[name] = PreActivationBlock(before, after, stride, affine)
            if layers[name].shortcut is not None:
                groups.append(stream)
                stream = [f"{name}.shortcut.1.weight"]
            groups.append([f"{name}.conv1.weight"])
            stream.append(f"{name}.conv2.weight")
            before = after
    layers["norm"] = nn.BatchNorm2d(before, affine=affine, eps=EPS)
    layers["relu"] = nn.ReLU()
    layers["global_pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    head = nn.Linear(before, classes, bias=False)
    layers["head"] = fixed_head(head).requires_grad_(train_head)
    net = nn.Sequential(layers)
    net.layer_groups = [*groups, stream]
    return net.to(memory_format=torch.channels_last)


class transformer(nn.Module):
    """A causal transformer of one layer, all of whose weights are scale invariant: tokens [N, T]
    int64 → [N, classes], the prediction at the last token.

    With n(x) = x/rms(x): n(embedding) + n(position); x + n(W_o·attention(n(x))), queries and keys
    through n, too; x + n(W_down·relu(W_up·n(x))); logits = 10·⟨n(x)/√d, √classes·W/‖W‖⟩.
    """

    def __init__(self, tokens, length, classes, width=64, heads=4):
        super().__init__()
        if width % heads:
            raise ValueError(f"the width of a transformer is a multiple of {heads}, not {width}")

        def weight(rows, columns):
            return nn.Parameter(torch.randn(rows, columns) / math.sqrt(columns))

        self.heads = heads
        self.embedding, self.position = weight(tokens, width), weight(length, width)
        self.query, self.key, self.value = (weight(width, width) for _ in range(3))
        self.out = weight(width, width)
        self.up, self.down = weight(4 * width, width), weight(width, 4 * width)
        self.head = weight(classes, width)
        self.layer_groups = [[name] for name, _ in self.named_parameters()]

    def forward(self, tokens):
        x = norm(self.embedding)[tokens] + norm(self.position)
        h = norm(x)
        split = (len(x), -1, self.heads, x.shape[-1] // self.heads)
        # Only the last token's output is wanted: it is the one query, and sees all tokens.
        q = norm(F.linear(h[:, -1], self.query).view(split).transpose(1, 2))
        k = norm(F.linear(h, self.key).view(split).transpose(1, 2))
        v = F.linear(h, self.value).view(split).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v).flatten(1)  # [N, width], head after head
        x = x[:, -1] + norm(F.linear(h, self.out))
        x = x + norm(F.linear(F.relu(F.linear(norm(x), self.up)), self.down))
        scale = 10 * math.sqrt(len(self.head) / x.shape[-1])
        return scale * F.linear(norm(x), self.head / self.head.norm())


def norm(x):
    """Scaled to root mean square 1 over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-12)


MODELS = {
    "convnet": convnet,
    "resnet18": resnet18,
    "transformer": transformer,
}


def build(name, data, **options):
    """The network of this name for these data. It gets what it names of channels, classes, tokens,
    length, width, affine and train_head. Raises ValueError where it cannot be."""
    if name not in MODELS:
        raise ValueError(f"no network {name!r}: choose {', '.join(MODELS)} or FILE.py:FUNCTION")
    takes, shape = inspect.signature(MODELS[name]).parameters, data.x.shape[1:]
    if "tokens" in takes and data.tokens is None:
        raise ValueError(f"the {name} takes tokens, as --data modular has, not these")
    if name in ("convnet", "resnet18") and (len(shape) != 3 or min(shape[1:]) < 8):
        raise ValueError(f"{name} takes images of at least 8 × 8, not {list(shape)}")
    for option, value in options.items():
        if value and option not in takes:
            raise ValueError(f"the {name} has no --{option.replace('_', '-')}: leave it out")
    known = dict(channels=shape[0], length=shape[0], classes=data.classes, tokens=data.tokens)
    known |= {option: value for option, value in options.items() if value}
    return MODELS[name](**{name: known[name] for name in takes if name in known})
