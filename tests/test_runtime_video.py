import io

import numpy as np
import pytest
from PIL import Image

from hdfast.runtime.errors import RunError
from hdfast.runtime.video import encode_gif, open_loop_grid, save_gif


def decode(gif):
    with Image.open(io.BytesIO(gif)) as image:
        frames = []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
        return np.stack(frames), image.info


def test_a_gif_shows_the_frames_enlarged_by_whole_pixels():
    frames = np.zeros((3, 16, 20, 3), np.uint8)
    frames[0, 2, 3] = (255, 0, 0)
    frames[1, 4, 5] = (0, 255, 0)
    frames[2, 6, 7] = (0, 0, 255)
    shown, info = decode(encode_gif(frames, frames_per_second=20, min_side=40))
    np.testing.assert_array_equal(shown, frames.repeat(3, axis=1).repeat(3, axis=2))
    assert (info["duration"], info["loop"]) == (50, 0)


def test_a_gif_of_grey_frames_and_of_frames_that_are_large_enough():
    frames = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) * np.full((1, 300, 260, 1), 60, np.uint8)
    shown, _ = decode(encode_gif(frames))
    np.testing.assert_array_equal(shown, np.broadcast_to(frames, (4, 300, 260, 3)))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((3, 8, 8, 3), np.float32),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((3, 8, 8, 4), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_what_is_not_a_video_is_refused_by_shape_and_dtype(frames):
    with pytest.raises(ValueError, match="uint8 frames, got"):
        encode_gif(frames)


def test_save_gif_says_where_it_could_not(tmp_path):
    (tmp_path / "videos").touch()
    with pytest.raises(RunError, match=r"a.gif: cannot write the video: "):
        save_gif(tmp_path / "videos" / "a.gif", b"GIF")


def test_the_grid_shows_truth_model_and_error_of_each_example_below_each_other():
    truth = np.array([0, 255], np.uint8).reshape(1, 2, 1, 1, 1) * np.ones((3, 2, 4, 5, 3), np.uint8)
    model = np.array([1.0, 0.5, -7.0], np.float32).reshape(3, 1, 1, 1, 1) * np.ones(
        (3, 2, 4, 5, 3), np.float32
    )
    grid = open_loop_grid(truth, model, context=1)
    assert grid.shape == (3, 3 * 6, 2 * 7, 3)
    assert grid.dtype == np.uint8
    cells = grid.reshape(3, 3, 6, 2, 7, 3)[:, :, 1:-1, :, 1:-1]  # (T, kind, H, B, W, 3)
    assert (cells == cells[:, :, :1, :, :1]).all()
    centre = cells[:, :, 0, :, 0, 0]  # (T, kind, B)
    # truth 0 and 1; model as given, clipped for display; error (model - truth + 1) / 2, clipped
    np.testing.assert_array_equal(centre[0], [[0, 255], [255, 255], [255, 128]])
    np.testing.assert_array_equal(centre[1], [[0, 255], [128, 128], [191, 64]])
    np.testing.assert_array_equal(centre[2], [[0, 255], [0, 0], [0, 0]])
    frame = grid.reshape(3, 3, 6, 2, 7, 3)[:, :, 0, :, 0]  # (T, kind, B, 3)
    assert (frame[0, 1] == (0, 160, 0)).all()  # seen
    assert (frame[1:, 1] == (200, 0, 0)).all()  # imagined
    assert (frame[:, [0, 2]] == (32, 32, 32)).all()


def test_the_grid_takes_uint8_and_grey_models():
    truth = np.full((2, 1, 3, 3, 1), 100, np.uint8)
    grid = open_loop_grid(truth, truth, context=2)
    cells = grid.reshape(2, 3, 5, 1, 5, 3)[:, :, 1:-1, :, 1:-1]
    assert (cells[:, :2] == 100).all()
    assert (cells[:, 2] == 128).all()
    with pytest.raises(ValueError, match="got"):
        open_loop_grid(truth, truth[:1], context=1)
