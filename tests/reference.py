"""HarmonyDream once more, in float64 and without hdfast: the reference that the tests compare the agent with.

It takes parameters with the names and layouts of the authors' program (thuml/HarmonyDream, dreamerv3-jax)
and computes every quantity and every gradient of one update. Given the draws of an authors' trace it
reproduces that trace; with its own draws it works for any sizes, for discrete and continuous actions, for an
image alone and for an image with a vector `state`.

Axes, batch-major as in the authors' program: B batch, T time, H horizon, N = B*T starting states, D deter,
S groups, K classes, A action width.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
Tensors = dict[str, Tensor]

UNIMIX, EPS = 0.01, 1e-3
DISCOUNT, LAMBDA, ENTROPY, DECAY = 1 - 1 / 333, 0.95, 3e-4, 0.99
DYN, REP, FREE_NATS = 0.5, 0.1, 1.0


def run(
    parameters: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    *,
    groups: int,
    horizon: int,
    draws: np.random.Generator | Mapping[str, np.ndarray],
) -> tuple[Arrays, Arrays]:
    """One update without the optimizers.

    Args:
        parameters: by the authors' names without `agent/`.
        batch: (B, T, ...) as read from replay, action one-hot or continuous.
        groups: S. horizon: H.
        draws: what was sampled, `post_stoch` (B, T, S, K), `traj_stoch` (H+1, N, S, K), `traj_action`
            (H+1, N, A) and for continuous actions `traj2_stoch`, `traj2_action`; or a generator that draws
            them.

    Returns:
        outputs and gradients by name, float64.
    """
    program = Program(parameters, batch, groups, draws)
    program.model()
    program.behavior(horizon)
    return tuple({k: v.detach().numpy() for k, v in x.items()} for x in (program.out, program.grad))


class Program:
    """The computation: `model`, then `behavior`, fill `out` and `grad`."""

    def __init__(self, parameters, batch, groups, draws):
        self.p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in parameters.items()}
        self.batch = {k: torch.tensor(v, dtype=torch.float64) for k, v in batch.items()}
        self.draws = draws
        self.latent = (groups, len(parameters["wm/rssm/img_stats/bias"]) // groups)
        self.continuous = "task_behavior/ac/actor/dist_out/std/kernel" in self.p
        self.out: Tensors = {}
        self.grad: Tensors = {}

    # Layers.

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        unit = centred / (variance + EPS).sqrt()
        return unit * self.p[f"{name}/norm/scale"] + self.p[f"{name}/norm/bias"]

    def activate(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(name, x)
        return x / (1 + (-x).exp())

    def hidden(self, name: str, x: Tensor) -> Tensor:
        return self.activate(name, x @ self.p[f"{name}/kernel"])

    def output(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}/kernel"] + self.p[f"{name}/bias"]

    def trunk(self, name: str, x: Tensor) -> Tensor:
        for i in range(sum(k.startswith(f"{name}/h") and k.endswith("/kernel") for k in self.p)):
            x = self.hidden(f"{name}/h{i}", x)
        return x

    def head(self, name: str, x: Tensor) -> Tensor:
        return self.output(f"{name}/dist_out/out", self.trunk(name, x))

    # World model.

    def encode_image(self, x: Tensor) -> Tensor:
        """(..., side, side, C) -> (..., 16 * channels): each pixel sees a 4x4 patch, two pixels apart."""
        lead = x.shape[:-3]
        x = (x / 255 - 0.5).reshape(-1, *x.shape[-3:])
        stage = 0
        while f"wm/enc/cnn/s{stage}res/kernel" in self.p:
            name = f"wm/enc/cnn/s{stage}res"
            side = x.shape[1]
            padded = x.new_zeros(x.shape[0], side + 2, side + 2, x.shape[3])
            padded[:, 1:-1, 1:-1] = x
            patches = padded.unfold(1, 4, 2).unfold(2, 4, 2)  # (N, side/2, side/2, C, 4, 4)
            x = torch.einsum("nyxcij,ijco->nyxo", patches, self.p[f"{name}/kernel"])
            x = self.activate(name, x)
            stage += 1
        return x.reshape(*lead, -1)

    def decode_image(self, feature: Tensor) -> Tensor:
        """(..., D + S*K) -> (..., side, side, C): each pixel paints a 4x4 patch, two pixels apart."""
        lead = feature.shape[:-1]
        x = self.output("wm/dec/cnn/in", feature).reshape(math.prod(lead), 4, 4, -1)
        stage = 0
        while f"wm/dec/cnn/s{stage}res/kernel" in self.p:
            name = f"wm/dec/cnn/s{stage}res"
            kernel, side = self.p[f"{name}/kernel"], x.shape[1]
            canvas = x.new_zeros(x.shape[0], 2 * side + 2, 2 * side + 2, kernel.shape[2])
            for i in range(4):
                # The authors' deconvolution does not flip its kernel: tap i paints row 3 - i.
                for j in range(4):
                    tap = torch.einsum("nyxc,oc->nyxo", x, kernel[i, j])
                    canvas[:, 3 - i : 3 - i + 2 * side : 2, 3 - j : 3 - j + 2 * side : 2] += tap
            x = canvas[:, 1:-1, 1:-1]
            bias = self.p.get(f"{name}/bias")
            x = self.activate(name, x) if bias is None else x + bias
            stage += 1
        return (x + 0.5).reshape(*lead, *x.shape[1:])

    def prior(self, deter: Tensor) -> Tensor:
        """(..., D) -> probabilities (..., S, K)."""
        return self.mix(self.output("wm/rssm/img_stats", self.hidden("wm/rssm/img_out", deter)))

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        x = self.hidden("wm/rssm/obs_out", torch.cat([deter, embed], -1))
        return self.mix(self.output("wm/rssm/obs_stats", x))

    def mix(self, logits: Tensor) -> Tensor:
        return mixture(logits.reshape(*logits.shape[:-1], *self.latent))

    def recur(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        action = action / action.detach().abs().clamp(min=1.0)
        x = self.hidden("wm/rssm/img_in", torch.cat([stoch.flatten(-2), action], -1))
        gates = self.norm("wm/rssm/gru", torch.cat([deter, x], -1) @ self.p["wm/rssm/gru/kernel"])
        reset, cand, update = gates.split(deter.shape[-1], -1)
        update = torch.sigmoid(update - 1)
        return deter + update * (torch.tanh(torch.sigmoid(reset) * cand) - deter)

    def sample(self, key: str, position: tuple, probs: Tensor) -> Tensor:
        """The one-hot sample there, from the trace or drawn now, with the gradient of its probabilities."""
        if isinstance(self.draws, np.random.Generator):
            race = probs.detach().log().numpy() + self.draws.gumbel(size=tuple(probs.shape))
        else:
            race = self.draws[key][position]
        hot = torch.eye(probs.shape[-1], dtype=torch.float64)[torch.as_tensor(race.argmax(-1))]
        return hot + probs - probs.detach()

    def model(self) -> None:
        """Posterior, losses, their harmonized sum, and its gradients."""
        p, batch, out = self.p, self.batch, self.out
        B, T = batch["reward"].shape
        embed = [self.encode_image(batch["image"])]
        if "state" in batch:
            embed.append(self.trunk("wm/enc/mlp", symlog(batch["state"])))
        embed = torch.cat(embed, -1)
        deter0 = torch.tanh(p["wm/rssm/initial"])
        mode = self.prior(deter0).argmax(-1, keepdim=True)
        stoch0 = torch.zeros(self.latent).double().scatter(-1, mode, 1.0)
        deter, stoch, action = (
            deter0.repeat(B, 1),
            stoch0.repeat(B, 1, 1),
            torch.zeros_like(batch["action"][:, 0]),
        )
        deters, stochs, posts, priors = [], [], [], []
        for t in range(T):
            first = batch["is_first"][:, t, None]
            deter = deter * (1 - first) + deter0 * first
            stoch = stoch * (1 - first[..., None]) + stoch0 * first[..., None]
            deter = self.recur(deter, stoch, action * (1 - first))
            posts.append(self.posterior(deter, embed[:, t]))
            priors.append(self.prior(deter))
            stoch = self.sample("post_stoch", (slice(None), t), posts[-1])
            action = batch["action"][:, t]
            deters.append(deter)
            stochs.append(stoch)
        deter, stoch, post, prior = (torch.stack(x, 1) for x in (deters, stochs, posts, priors))
        feature = torch.cat([deter, stoch.flatten(-2)], -1)
        image = self.decode_image(feature)
        reward = self.head("wm/rew", feature)
        going_on = torch.sigmoid(self.head("wm/cont", feature)[..., 0])
        cont = 1 - batch["is_terminal"]
        losses = {
            "dyn": divergence(post.detach(), prior).clamp(min=FREE_NATS),
            "rep": divergence(post, prior.detach()).clamp(min=FREE_NATS),
            "reward": two_hot_loss(reward, batch["reward"]),
            "image": ((image - batch["image"] / 255) ** 2).sum((-3, -2, -1)),
            "cont": -(cont * going_on.log() + (1 - cont) * (1 - going_on).log()),
        }
        if "state" in batch:
            decoded = self.output("wm/dec/mlp/dist_state/out", self.trunk("wm/dec/mlp", feature))
            losses["state"] = ((decoded - symlog(batch["state"])) ** 2).sum(-1)
        s = {name: p[f"wm/har_s{i}/harmony_s"] for i, name in enumerate(("reward", "image", "kl"), 1)}
        total = (
            harmonious(losses["reward"], s["reward"])
            + harmonious(losses["image"], s["image"])
            + DYN / (DYN + REP) * harmonious(losses["dyn"], s["kl"])
            + REP / (DYN + REP) * losses["rep"] / s["kl"].exp()
            + losses["cont"]
            + losses.get("state", 0.0)
        ).mean()
        out |= {"embed": embed, "post_deter": deter, "post_logit": post.log(), "post_stoch": stoch}
        out |= {"prior_deter": deter, "prior_logit": prior.log(), "recon": image}
        out |= {"reward_logits": reward, "reward_mean": two_hot_mean(reward), "cont_prob": going_on}
        out |= {"initial_deter": deter0.repeat(2, 1), "initial_stoch": stoch0.repeat(2, 1, 1)}
        out |= {f"loss_{k}": v for k, v in losses.items()} | {"model_loss": total}
        out |= {f"harmony_s{i}": x for i, x in enumerate(s.values(), 1)}
        self.gradients(total, "wm/")

    def gradients(self, loss: Tensor, prefix: str) -> None:
        names = [k for k in self.p if k.startswith(prefix)]
        found = torch.autograd.grad(loss, [self.p[k] for k in names], allow_unused=True, retain_graph=True)
        self.grad |= {
            k: torch.zeros_like(self.p[k]) if g is None else g for k, g in zip(names, found, strict=True)
        }

    # Behavior.

    def policy(self, feature: Tensor) -> tuple[Tensor, ...]:
        """Probabilities (..., A) of discrete actions; mean and deviation (..., A) of continuous ones."""
        x = self.trunk("task_behavior/ac/actor", feature)
        first = self.output("task_behavior/ac/actor/dist_out/out", x)
        if not self.continuous:
            return (mixture(first),)
        second = self.output("task_behavior/ac/actor/dist_out/std", x)
        return torch.tanh(first), 0.1 + (1.0 - 0.1) * torch.sigmoid(second + 2)

    def act(self, key: str, t: int, feature: Tensor) -> Tensor:
        """The action drawn at step t; a continuous one carries the gradient of its mean and deviation."""
        if not self.continuous:
            return self.sample(key, (t,), self.policy(feature)[0])
        mean, std = self.policy(feature)
        if isinstance(self.draws, np.random.Generator):
            noise = torch.from_numpy(self.draws.standard_normal(tuple(mean.shape)))
        else:
            noise = ((torch.as_tensor(self.draws[key][t]).double() - mean) / std).detach()
        return mean + std * noise

    def rollout(self, key: str, horizon: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """deter (H+1, N, D), stoch (H+1, N, S, K), action (H+1, N, A), prior's log p (H+1, N, S, K)."""
        deter = self.out["post_deter"].detach().flatten(0, 1)
        stoch = self.out["post_stoch"].detach().flatten(0, 1)
        deters, stochs, actions = [deter], [stoch], []
        logits = [self.out["post_logit"].detach().flatten(0, 1)]
        for t in range(horizon + 1):
            feature = torch.cat([deter, stoch.flatten(-2)], -1).detach()
            actions.append(self.act(f"{key}_action", t, feature))
            if t == horizon:
                break
            deter = self.recur(deter, stoch, actions[-1])
            probs = self.prior(deter)
            stoch = self.sample(f"{key}_stoch", (t + 1,), probs)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(probs.log())
        return torch.stack(deters), torch.stack(stochs), torch.stack(actions), torch.stack(logits)

    def evaluate(self, feature: Tensor) -> Tensors:
        """Rewards, values, returns and weights of imagined features (H+1, N, D + S*K)."""
        cont = (self.head("wm/cont", feature)[..., 0] > 0).double()
        cont[0] = 1 - self.batch["is_terminal"].flatten()
        logits = self.head("task_behavior/critic/net", feature)
        value, reward = two_hot_mean(logits), two_hot_mean(self.head("wm/rew", feature))[1:]
        return {
            "cont": cont,
            "weight": torch.stack([DISCOUNT**t * cont[: t + 1].prod(0) for t in range(len(cont))]),
            "logits": logits,
            "value": value,
            "reward": reward,
            "return": mixed_return(reward, DISCOUNT * cont, value),
            "slow": two_hot_mean(self.head("task_behavior/critic/slow", feature)).detach(),
        }

    def behavior(self, horizon: int) -> None:
        """Imagination, critic loss, actor loss, and their gradients."""
        out = self.out
        deter, stoch, action, logit = (x.detach() for x in self.rollout("traj", horizon))
        feature = torch.cat([deter, stoch.flatten(-2)], -1)
        e = self.evaluate(feature)
        target = e["return"].detach()
        to_return, to_slow = (two_hot_loss(e["logits"][:-1], x) for x in (target, e["slow"][:-1]))
        critic_loss = ((to_return + to_slow) * e["weight"][:-1]).mean()
        self.gradients(critic_loss, "task_behavior/critic/net/")
        out |= {"traj_deter": deter, "traj_stoch": stoch, "traj_action": action, "traj_logit": logit}
        out |= {"traj_cont": e["cont"], "traj_weight": e["weight"]}
        out |= {"imag_reward": e["reward"], "imag_return": target, "imag_value": e["value"][:-1]}
        out |= {"critic_logits": e["logits"], "slow_mean": e["slow"], "critic_loss": critic_loss}
        if self.continuous:
            out["actor_mean"], out["actor_std"] = self.policy(feature)
            deter, stoch, action, _ = self.rollout("traj2", horizon)
            feature = torch.cat([deter, stoch.flatten(-2)], -1)
            out |= {"traj2_deter": deter, "traj2_stoch": stoch, "traj2_action": action}
            e = self.evaluate(feature)
        else:
            out["actor_logits"] = self.policy(feature)[0].log()
        before = torch.stack([self.p[f"task_behavior/ac/retnorm_extr/{k}/value"] for k in ("low", "high")])
        bounds = (DECAY * before + (1 - DECAY) * percentiles(e["return"], (0.05, 0.95))).detach()
        advantage = (e["return"] - e["value"][:-1]) / max(1.0, (bounds[1] - bounds[0]).item())
        parts = self.policy(feature.detach()[:-1])
        if self.continuous:
            entropy = (parts[1].log() + 0.5 * math.log(2 * math.pi) + 0.5).sum(-1)
            gain = advantage
        else:
            entropy = -(parts[0] * parts[0].log()).sum(-1)
            gain = (parts[0].log() * action[:-1]).sum(-1) * advantage.detach()
        actor_loss = ((-gain - ENTROPY * entropy) * e["weight"][:-1].detach()).mean()
        self.gradients(actor_loss, "task_behavior/ac/actor/")
        out |= {"retnorm_before": before, "retnorm_after": bounds, "actor_loss": actor_loss}


def symlog(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log(1 + x.abs())


def mixture(logits: Tensor) -> Tensor:
    """Probabilities (..., K), one per cent uniform."""
    odds = (logits - logits.amax(-1, keepdim=True)).exp()
    return (1 - UNIMIX) * odds / odds.sum(-1, keepdim=True) + UNIMIX / logits.shape[-1]


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL of probabilities (..., S, K), summed over the groups: (...)."""
    return (a * (a / b).log()).sum((-2, -1))


def harmonious(loss: Tensor, s: Tensor) -> Tensor:
    return loss / s.exp() + (1 + s.exp()).log()


def two_hot_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the two-hot code of symlog(target): its two nearest bins, weighted by nearness."""
    bins = torch.linspace(-20, 20, logits.shape[-1], dtype=torch.float64)
    spacing = bins[1] - bins[0]
    x = symlog(target).clamp(-20, 20)
    code = (1 - (x[..., None] - bins).abs() / spacing).clamp(min=0.0)
    return -(code * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1)


def two_hot_mean(logits: Tensor) -> Tensor:
    bins = torch.linspace(-20, 20, logits.shape[-1], dtype=torch.float64)
    x = (torch.softmax(logits, -1) * bins).sum(-1)
    return torch.sign(x) * (torch.exp(x.abs()) - 1)


def mixed_return(reward: Tensor, discount: Tensor, value: Tensor) -> Tensor:
    """The lambda-return by its definition, a geometric mixture of n-step returns.

    reward: (H, N). discount, value: (H+1, N).
    """
    H = len(reward)
    rows = []
    for t in range(H):
        gathered, decay, mixed = 0.0, torch.ones_like(value[0]), 0.0
        for n in range(1, H - t + 1):
            gathered = gathered + decay * reward[t + n - 1]
            decay = decay * discount[t + n]
            share = LAMBDA ** (n - 1) * (1.0 if n == H - t else 1 - LAMBDA)
            mixed = mixed + share * (gathered + decay * value[t + n])
        rows.append(mixed)
    return torch.stack(rows)


def percentiles(x: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Linearly interpolated order statistics of all entries."""
    ordered = x.detach().flatten().sort().values
    places = [share * (len(ordered) - 1) for share in shares]
    return torch.stack(
        [torch.lerp(ordered[int(r)], ordered[min(int(r) + 1, len(ordered) - 1)], r - int(r)) for r in places]
    )
