"""One table: every model of the zoo in linen and in nnx, and what is said about its kernels.

The tests hold it against the library, and `docs/zoo.md` shows it: `python tests/zoo_table.py` writes that page anew.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import zoo
import zoo_nnx
import zoo_sequence
import zoo_vision
from flax import linen as nn
from flax import nnx

random = np.random.default_rng(0)
INPUTS = {
    "vectors": random.normal(size=(4, 10)).astype(np.float32),
    "sequences": random.normal(size=(3, 3, 6)).astype(np.float32),
    "images": random.normal(size=(2, 4, 4, 3)).astype(np.float32),
    "tokens": random.integers(0, 11, size=(3, 4)),
}
Verdict = Literal["exact", "estimated", "refused"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes
    ----------
    name : as its authors call it.
    linen, nnx : the module, and its twin as a factory of nnx.
    inputs : key of `INPUTS`.
    verdict : "exact"; "estimated": refused by the exact rules, with a standard error by Monte Carlo; "refused" by both.
    why : words of the message of the first refusal; empty for exact models.
    options : of `kernel_fn`, for linen.
    """

    name: str
    linen: Any
    nnx: Any
    inputs: str
    verdict: Verdict = "exact"
    why: str = ""
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def factory(self):
        return lambda rngs: self.nnx(rngs=rngs)


evaluation = {"apply_kwargs": {"train": False}}
training = {"apply_kwargs": {"train": True}, "rngs": {"dropout": jax.random.key(0)}}
fixed_statistics = functools.partial(nn.BatchNorm, use_running_average=True)
fixed_statistics_nnx = functools.partial(nnx.BatchNorm, use_running_average=True)
groups, groups_nnx = (functools.partial(module, num_groups=4) for module in (nn.GroupNorm, nnx.GroupNorm))
several = "a nonlinear function of several different random fields"
scores = "a product of two random fields (attention scores"
batch = functools.partial(nn.BatchNorm, use_running_average=False)
batch_nnx = functools.partial(nnx.BatchNorm, use_running_average=False)

_classes = ("relu", "leaky_relu", "abs", "tanh", "erf", "gelu", "silu", "softplus", "elu", "relu6", "square")
ZOO = [
    *(Entry(f"MLP, {name}", zoo.MLP(name), functools.partial(zoo.MLPnnx, 10, name), "vectors") for name in _classes),
    Entry("SIREN", zoo.Siren(), zoo_nnx.Siren, "vectors"),
    Entry("autoencoder", zoo.Autoencoder(), zoo_nnx.Autoencoder, "vectors"),
    Entry(
        "autoencoder, tied",
        zoo.TiedAutoencoder(),
        zoo_nnx.TiedAutoencoder,
        "vectors",
        "refused",
        "W and its transpose in one forward pass are not independent",
    ),
    Entry("trunk with two heads", zoo.TwoHeads(), zoo_sequence.MultiHeadNnx, "vectors"),
    Entry("relu, then LayerNorm", zoo.Normed(), zoo_nnx.Normed, "vectors"),
    Entry("layers side by side, LayerNorm", zoo.Concatenated(nn.LayerNorm), zoo_nnx.Concatenated, "vectors"),
    Entry("SwiGLU", zoo.Gated(), zoo_nnx.Gated, "vectors"),
    Entry("pre-RMSNorm SwiGLU residual blocks", zoo.PreNormBlock(), zoo_nnx.PreNormBlock, "vectors"),
    Entry("weights shared over depth", zoo.TiedRecurrent(), zoo_nnx.TiedRecurrent, "vectors"),
    Entry(
        "residual MLP, activation after the sum",
        zoo.PostActivationResNet(),
        zoo_nnx.PostActivationResNet,
        "vectors",
        "estimated",
        several,
    ),
    Entry(
        "mixture of experts, top-1 routing",
        zoo_sequence.TopOneExperts(),
        zoo_sequence.TopOneExpertsNnx,
        "vectors",
        "refused",
        "the indices depend on weights (routing",
    ),
    Entry("DeepSets", zoo.DeepSets(), zoo_nnx.DeepSets, "sequences"),
    Entry("LeNet, average pooling", zoo.LeNet(), zoo_nnx.LeNet, "images"),
    Entry(
        "LeNet, max-pooling",
        zoo_vision.LeNetMax(),
        zoo_vision.LeNetMaxNnx,
        "images",
        "estimated",
        "a maximum over positions (max-pooling)",
    ),
    Entry(
        "ResNet v1, BatchNorm in evaluation",
        zoo_vision.ResNetV1(),
        zoo_vision.ResNetV1Nnx,
        "images",
        "estimated",
        several,
        evaluation,
    ),
    Entry(
        "ResNet v1, zero gamma",
        zoo_vision.ResNetV1(0.0),
        functools.partial(zoo_vision.ResNetV1Nnx, 0.0),
        "images",
        options=evaluation,
    ),
    Entry(
        "ResNet v2, BatchNorm in evaluation",
        zoo_vision.ResNetV2(fixed_statistics),
        functools.partial(zoo_vision.ResNetV2Nnx, fixed_statistics_nnx),
        "images",
    ),
    Entry(
        "ResNet v2, BatchNorm in training",
        zoo_vision.ResNetV2(batch),
        functools.partial(zoo_vision.ResNetV2Nnx, batch_nnx),
        "images",
        "estimated",
        "mean and variance over the batch (BatchNorm in training mode)",
    ),
    Entry("ResNet v2, LayerNorm", zoo_vision.ResNetV2(), zoo_vision.ResNetV2Nnx, "images"),
    Entry(
        "ResNet v2, GroupNorm",
        zoo_vision.ResNetV2(groups),
        functools.partial(zoo_vision.ResNetV2Nnx, groups_nnx),
        "images",
    ),
    Entry("WideResNet block, dropout", zoo_vision.WideResNet(), zoo_vision.WideResNetNnx, "images", options=training),
    Entry("ResNeXt block", zoo.GroupedConvolution(), zoo_nnx.GroupedConvolution, "images"),
    Entry("DenseNet", zoo.DenseNet(), zoo_vision.DenseNetNnx, "images"),
    Entry("U-Net", zoo.UNet(), zoo_nnx.UNet, "images"),
    Entry(
        "ConvNeXt block",
        zoo.ConvNeXtBlock(),
        zoo_nnx.ConvNeXtBlock,
        "images",
        "estimated",
        "one channel in each group (a depthwise convolution)",
    ),
    Entry(
        "MLP-Mixer",
        zoo_vision.Mixer(),
        zoo_vision.MixerNnx,
        "images",
        "refused",
        "sums over positions while channels stay free (token mixing)",
    ),
    Entry("ViT", zoo_vision.ViT(), zoo_vision.ViTNnx, "images", "estimated", scores),
    Entry("transformer, pre-LN", zoo_sequence.Encoder(), zoo_sequence.EncoderNnx, "sequences", "estimated", scores),
    Entry(
        "transformer, post-LN",
        zoo_sequence.Encoder(False),
        functools.partial(zoo_sequence.EncoderNnx, False),
        "sequences",
        "estimated",
        scores,
    ),
    Entry(
        "decoder block: RMSNorm, rotary attention, SwiGLU",
        zoo_sequence.Decoder(),
        zoo_sequence.DecoderNnx,
        "tokens",
        "estimated",
        "some channels made by the weight q/kernel are taken out (rotary codes",
    ),
    Entry("embedding and classifier", zoo.TextClassifier(), zoo_nnx.TextClassifier, "tokens"),
    Entry(
        "language model, tied embedding",
        zoo_sequence.TiedLanguageModel(),
        zoo_sequence.TiedLanguageModelNnx,
        "tokens",
        "refused",
        "W and its transpose in one forward pass are not independent",
    ),
    Entry(
        "RNN",
        zoo_sequence.Recurrent(nn.SimpleCell),
        functools.partial(zoo_sequence.RecurrentNnx, nnx.SimpleCell),
        "sequences",
    ),
    Entry(
        "GRU",
        zoo_sequence.Recurrent(nn.GRUCell),
        functools.partial(zoo_sequence.RecurrentNnx, nnx.GRUCell),
        "sequences",
        "estimated",
        several,
    ),
    Entry("LSTM", zoo_sequence.Recurrent(), zoo_sequence.RecurrentNnx, "sequences", "estimated", several),
]


# ------------------------------------------------------------------ the page of the documentation

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
SAID = {"exact": "exact", "estimated": "with a standard error", "refused": "refused"}
HEAD = """# The zoo: what can be said about which model

Models as their authors write them, each in linen and as a twin in nnx. *Exact*: `ij.kernel_fn(model, x)` gives the
kernels of infinite width to rounding. *With a standard error*: that call refuses, for the reason given, and
`on_unsupported="monte_carlo"` estimates every entry. *Refused*: both do, since there is no limit of infinite width, or
none that is known here. `ij.measure` and `ij.inspect` measure all of them. Written by `python tests/zoo_table.py` from
the table that `tests/test_zoo.py` holds against the library.

| model | kernels | why not exact |
|---|---|---|
"""


def page() -> str:
    """The page as it should be."""
    rows = [f"| {e.name} | {SAID[e.verdict]} | {e.why + ')' * (e.why.count('(') - e.why.count(')'))} |" for e in ZOO]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
