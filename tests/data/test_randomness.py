"""Draws are functions of (seed, index, purpose): pinned, independent, and the same however a run is spread."""

import itertools

import numpy as np
import pytest

from utils.randomness import CLASS, Purpose, draw_sample, generator, photo_index, sample_indices

DRAW = dict(num_photos=4, latent_shape=(4, 8, 8), num_train_timesteps=1000)


def test_the_draws_of_a_run_never_change():
    # These numbers define what a seed means; a change of numpy or of this module that moves them breaks every resume.
    sample = draw_sample(0, 5, **DRAW)
    assert (sample.photo, sample.timestep) == (2, 361)
    np.testing.assert_allclose(sample.crop, [0.33734173205638895, 0.6272288955437172], rtol=1e-12)
    np.testing.assert_allclose(sample.noise[0, 0, :3], [1.941191, 0.3597125, -0.3081338], rtol=1e-6)
    np.testing.assert_allclose(sample.latent_noise[0, 0, :3], [-0.5084186, -0.524086, -0.7615071], rtol=1e-6)


def test_streams_differ_by_seed_index_and_purpose():
    streams = [
        tuple(generator(seed, index, purpose).random(4))
        for seed, index, purpose in itertools.product((0, 1, 2**32 - 1), (0, 1, 2**40), (Purpose.NOISE, Purpose.CROP))
    ]
    assert len(set(streams)) == len(streams)


def test_every_epoch_shows_each_photo_once_in_changing_order():
    epochs = [[photo_index(7, epoch * 5 + i, 5) for i in range(5)] for epoch in range(20)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5


def test_noise_is_standard_normal():
    noise = np.stack([draw_sample(3, index, **DRAW).noise for index in range(100)])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(("micro", "ranks", "batch"), [(1, 1, 4), (1, 2, 2), (4, 1, 1), (2, 2, 1)])
def test_a_step_covers_the_same_samples_however_it_is_spread(micro, ranks, batch):
    spread = dict(num_micro_batches=micro, num_ranks=ranks, batch_size=batch)
    covered = [i for m in range(micro) for r in range(ranks) for i in sample_indices(3, m, r, **spread)]
    assert covered == [12, 13, 14, 15]


class TestDraws:
    """Class samples have streams of their own, and never move those of the photos."""

    def test_the_draws_of_class_samples_never_change(self):
        sample = draw_sample(0, 5, **DRAW, stream=CLASS)
        assert (sample.photo, sample.timestep) == (3, 842)
        photo = draw_sample(0, 5, **DRAW)
        assert abs(np.corrcoef(sample.noise.ravel(), photo.noise.ravel())[0, 1]) < 0.2
        assert abs(np.corrcoef(sample.latent_noise.ravel(), photo.latent_noise.ravel())[0, 1]) < 0.2

    def test_a_noise_offset_shifts_whole_channels_by_its_size(self):
        shifts = []
        for index in range(300):
            plain, shifted = (draw_sample(1, index, **DRAW, noise_offset=offset) for offset in (0.0, 0.1))
            shift = shifted.noise - plain.noise
            assert np.ptp(shift, axis=(1, 2)).max() < 1e-6
            assert shifted.timestep == plain.timestep and (shifted.latent_noise == plain.latent_noise).all()
            shifts.append(shift[:, 0, 0])
        assert np.std(shifts) == pytest.approx(0.1, rel=0.1)
