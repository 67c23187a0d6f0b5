"""Which losses of the world model share a harmony scalar, and with what constant weights (ALGORITHM §1)."""

from hdfast.config import Config
from hdfast_kernels import Harmonizer


def build_harmonizer(config: Config, *, images: bool, vectors: tuple[str, ...]) -> Harmonizer:
    """The harmonizer of a world model.

    Reward, image and KL each have a scalar. The KL group splits its weight between dyn and rep as the loss scales do
    (5/6 and 1/6), and carries its regulariser with the weight of dyn, as in thuml/HarmonyDream, dreamerv3-jax.
    Continuation and vector observations keep their plain scale in every mode.

    Args:
        images: the agent sees images. vectors: names of its vector observations.
    """
    loss, harmony = config.loss, config.harmony
    plain = {"cont": loss.cont, **dict.fromkeys(vectors, loss.vector)}
    observed = {"image": loss.image} if images else {}
    if harmony.mode == "off":
        scales = {"reward": loss.reward, "dyn": loss.dyn, "rep": loss.rep, **observed, **plain}
        return Harmonizer({}, mode="off", scales=scales)
    dyn = loss.dyn / (loss.dyn + loss.rep)
    groups = {"reward": {"reward": 1.0}, "kl": {"dyn": dyn, "rep": 1 - dyn}}
    weights = {"reward": harmony.reward, "kl": harmony.kl}
    if images:
        groups["image"], weights["image"] = {"image": 1.0}, harmony.image
    fixed, initial = (weights, None) if harmony.mode == "fixed" else (None, weights)
    return Harmonizer(
        groups, mode=harmony.mode, regularizer={"kl": dyn}, fixed=fixed, initial=initial, scales=plain
    )
