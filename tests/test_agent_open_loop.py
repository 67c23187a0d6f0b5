"""Open-loop prediction: what follows the rows that the model sees is imagined, from the actions alone."""

import numpy as np
import pytest
import torch

from hdfast.agent.networks import Latent
from hdfast.agent.open_loop import CONTEXT, films, open_loop
from hdfast.envs.base import ArraySpec
from hdfast.runtime.video import open_loop_grid
from tests.agent_cases import IMAGE, VECTOR, make_batch, make_learner, one_thread  # noqa: F401

F32 = torch.float32
GREY, PAIR = (ArraySpec((8, 8, channels), np.uint8) for channels in (1, 2))


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_each_row_is_imagined_from_the_one_before_and_the_action_chosen_there(continuous):
    learner = make_learner(continuous, specs={"image": IMAGE, "grey": GREY, "state": VECTOR})
    model, batch = learner.model, make_batch(learner)
    model.decoder["image"].bias.data[0] += 0.6  # beyond white
    generator = learner.generator.get_state()
    images = open_loop(learner, batch, context=2)
    assert torch.equal(learner.generator.get_state(), generator)
    assert {key: tuple(image.shape) for key, image in images.items()} == {
        "image": (6, 3, 8, 8, 3),
        "grey": (6, 3, 8, 8, 1),
    }
    uniform = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model.observe({key: rows[:2] for key, rows in batch.items()}, uniform[:2], F32).latent
        states = [Latent(seen.deter[t], seen.index[t]) for t in range(2)]
        for t in range(2, 6):
            states.append(
                model.rssm.imagine_step(states[-1], batch["action"][t - 1], uniform[t], model.rssm.cast(F32))
            )
        for t, state in enumerate(states):
            for key, expected in model.decode(Latent(state.deter, state.index), F32).items():
                if key in images:
                    assert torch.allclose(images[key][t], expected.clamp(0, 1), atol=1e-5)
    assert images["image"].max() == 1


def test_films_show_the_truth_over_the_model_for_images_of_one_or_three_channels():
    specs = {"image": IMAGE, "grey": GREY, "pair": PAIR}
    learner = make_learner(specs=specs, replay={"batch": 3, "length": CONTEXT + 2})
    batch = make_batch(learner)
    shown, model = films(learner, batch), open_loop(learner, batch)
    assert set(shown) == {"image", "grey"}
    assert set(model) == set(specs)
    for key, frames in shown.items():
        assert np.array_equal(frames[:, 1:9, 1:9], np.broadcast_to(batch[key][:, 0], (CONTEXT + 2, 8, 8, 3)))
        grid = open_loop_grid(batch[key].numpy(), model[key].numpy(), context=CONTEXT)
        assert np.array_equal(frames, grid)
