"""Catch as pixels: what the images show, what the rows say, and that the game can be won from them."""

import numpy as np

from hdfast import envs

BALL, PADDLE = (255, 255, 0), (0, 0, 255)
LEFT, STAY, RIGHT = 0, 1, 2


def centres(image, colour):
    """Mean column of the pixels of one colour, (N, 16, 16, 3) -> (N,), NaN where there are none."""
    hit = (image == np.array(colour, np.uint8)).all(-1)  # (N, 16, 16)
    columns = np.where(hit, np.arange(16), np.nan)
    return np.array([np.nanmean(c) if h.any() else np.nan for c, h in zip(columns, hit, strict=True)])


def follow(image):
    """The action that moves the paddle under the ball, int32 (N,)."""
    gap = np.nan_to_num(centres(image, BALL) - centres(image, PADDLE))
    return np.where(gap < -1, LEFT, np.where(gap > 1, RIGHT, STAY)).astype(np.int32)


def test_a_drawn_board_is_what_it_says():
    with envs.make("demo", "Catch", num_envs=5, seed=1) as env:
        assert env.obs_specs == {"image": envs.ArraySpec((16, 16, 3), np.dtype(np.uint8))}
        assert env.actions == envs.DiscreteActions(3)
        assert env.action_repeat == 1
        image = env.reset().obs["image"]
        assert image.shape == (5, 16, 16, 3)
        assert image.dtype == np.uint8
        # Two of sixteen pixel rows show the ball's row (the first), one the paddle's (the last).
        lit = (image != 128).any(-1)  # (5, 16, 16)
        assert lit[:, 0].sum(-1).tolist() == lit[:, 1].sum(-1).tolist()
        assert (lit[:, 0].sum(-1) >= 3).all()
        assert not lit[:, 2:15].any()
        # The paddle starts in the middle: columns 7, 8, 9.
        assert np.argwhere(lit[0, 15]).ravel().tolist() == [7, 8, 9]
        assert (image[:, 15, 8] == PADDLE).all()
        # Left goes left.
        before = centres(image, PADDLE)
        after = centres(env.step(np.full(5, LEFT, np.int32)).obs["image"], PADDLE)
        assert (after < before - 2).all()


def test_episodes_have_ten_rows_and_the_reward_is_in_the_last():
    with envs.make("demo", "Catch", num_envs=4, seed=0) as env:
        step, rng = env.reset(), np.random.default_rng(0)
        for row in range(60):
            assert step.is_first.tolist() == [row % 10 == 0] * 4
            assert step.is_last.tolist() == [row % 10 == 9] * 4
            assert step.is_terminal.tolist() == step.is_last.tolist()
            assert step.reward.dtype == np.float32
            assert (np.abs(step.reward) == (1 if row % 10 == 9 else 0)).all()
            step = env.step(env.actions.sample(rng, 4))


def test_following_the_ball_in_the_image_always_wins_and_fleeing_never():
    for sign, outcome in ((1, 1.0), (-1, -1.0)):
        with envs.make("demo", "Catch", num_envs=16, seed=3) as env:
            step = env.reset()
            for _ in range(49):
                action = follow(step.obs["image"])
                if sign < 0:  # to the wall on the other side of the ball
                    ball = np.nan_to_num(centres(step.obs["image"], BALL))
                    action = np.where(ball < 8, RIGHT, LEFT).astype(np.int32)
                step = env.step(action)
                assert (step.reward[step.is_last] == outcome).all()
            assert step.is_last.all()


def test_a_seed_decides_everything():
    def play(seed, num_envs):
        with envs.make("demo", "Catch", num_envs=num_envs, seed=seed, threads=1 + seed % 2) as env:
            rows = [env.reset()] + [env.step(np.full(num_envs, RIGHT, np.int32)) for _ in range(60)]
        return np.stack([row.obs["image"] for row in rows])

    first = play(0, 4)
    assert np.array_equal(first, play(0, 4))
    assert np.array_equal(first[:, :2], play(0, 2))
    assert not np.array_equal(first, play(1, 4))
