"""Track as pixels: what the images show, what the rows say, and what playing by them earns."""

import numpy as np

from hdfast import envs

DOT, PADDLE = (255, 255, 255), (0, 0, 255)
LEFT, STAY, RIGHT = 0, 1, 2


def cells(image):
    """The cells of dot and of paddle in the images (N, 16, 16, 3), each (N,); that of the paddle is its middle."""
    dot = (image[:, 1] == DOT).all(-1).argmax(-1) // 2
    hit = (image[:, 15, ::2] == PADDLE).all(-1)  # (N, 8)
    first, last = hit.argmax(-1), 7 - hit[:, ::-1].argmax(-1)
    paddle = np.where(first == 0, last - 1, np.where(last == 7, first + 1, (first + last) // 2))
    return dot, paddle


def play(policy, num_envs=16, steps=330, seed=3):
    """The mean score of the whole episodes, and all rows."""
    with envs.make("demo", "Track", num_envs=num_envs, seed=seed) as env:
        rows = [env.reset()]
        for _ in range(steps - 1):
            rows.append(env.step(policy(rows[-1].obs["image"]).astype(np.int32)))
    rewards = np.stack([row.reward for row in rows])
    return rewards.sum() / np.stack([row.is_last for row in rows]).sum(), rows


def test_images_show_dot_and_paddle_before_blocks_that_change():
    with envs.make("demo", "Track", num_envs=5, seed=1) as env:
        assert env.obs_specs == {"image": envs.ArraySpec((16, 16, 3), np.dtype(np.uint8))}
        assert env.actions == envs.DiscreteActions(3)
        before = env.reset().obs["image"]
        assert (before.shape, before.dtype) == ((5, 16, 16, 3), np.uint8)
        assert ((before[:, 1:3] == DOT).all(-1).sum((1, 2)) >= 4).all()
        middle = before[:, 4:12].reshape(5, 2, 4, 4, 4, 3)  # two rows of four blocks of 4 x 4 pixels
        assert (middle == middle[:, :, :1, :, :1]).all()
        dot, paddle = cells(before)
        for action, way in ((LEFT, -1), (RIGHT, 1), (STAY, 0)):
            after = env.step(np.full(5, action, np.int32)).obs["image"]
            moved = cells(after)
            assert (moved[1] == np.clip(paddle + way, 0, 7)).all()
            assert (np.abs(moved[0] - dot) == 1).all()
            assert (after[:, 4:12] != before[:, 4:12]).mean() > 0.9
            before, (dot, paddle) = after, moved


def test_without_blocks_the_dots_are_the_same():
    rows = []
    for task in ("Track", "TrackGrey"):
        with envs.make("demo", task, num_envs=3, seed=1) as env:
            rows.append([env.reset(), *(env.step(np.full(3, RIGHT, np.int32)) for _ in range(40))])
    for blocks, grey in zip(*rows, strict=True):
        assert np.array_equal(cells(blocks.obs["image"]), cells(grey.obs["image"]))
        assert np.array_equal(blocks.reward, grey.reward)
        assert (grey.obs["image"][:, 3:14] == 128).all()


def test_an_episode_has_a_first_row_and_32_steps_and_is_truncated():
    rng = np.random.default_rng(0)
    _, rows = play(lambda image: rng.integers(3, size=len(image)), num_envs=4, steps=99)
    for number, row in enumerate(rows):
        dot, paddle = cells(row.obs["image"])
        assert row.is_first.tolist() == [number % 33 == 0] * 4
        assert row.is_last.tolist() == [number % 33 == 32] * 4
        assert not row.is_terminal.any()
        assert row.reward.dtype == np.float32
        assert row.reward.tolist() == ((np.abs(dot - paddle) <= 1) & ~row.is_first).tolist()


def test_what_can_be_earned():
    """The README's scores of following the dot, of a paddle that is parked in the middle, and of chance."""

    def follow(image):
        dot, paddle = cells(image)
        return np.sign(dot - paddle) + 1

    def park(image):
        return np.sign(4 - cells(image)[1]) + 1

    rng = np.random.default_rng(0)
    for policy, score in (
        (follow, 31.0),
        (park, 13.8),
        (lambda image: rng.integers(3, size=len(image)), 11.5),
    ):
        assert abs(play(policy, num_envs=64)[0] - score) < 0.7


def test_a_seed_decides_everything():
    def images(seed, num_envs):
        return np.stack(
            [
                row.obs["image"]
                for row in play(lambda image: np.full(len(image), RIGHT), num_envs, 70, seed)[1]
            ]
        )

    first = images(0, 4)
    assert np.array_equal(first, images(0, 4))
    assert np.array_equal(first[:, :2], images(0, 2))
    assert not np.array_equal(first, images(1, 4))


def test_an_environment_that_is_reset_begins_anew():
    with envs.make("demo", "Track", num_envs=2, seed=0) as env:
        env.reset()
        for _ in range(5):
            env.step(np.full(2, STAY, np.int32))
        again = env.reset()
        assert again.is_first.all()
        assert not again.is_last.any()
        assert not again.reward.any()
        assert not env.step(np.full(2, STAY, np.int32)).is_first.any()
