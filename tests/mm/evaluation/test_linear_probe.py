import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mm.evaluation.linear_probe import fit_linear_probe, pooled_features
from vision.encoder import VisionEncoder, VisionEncoderConfig
from vision.tiling import Tiles

CLASSES = ("bird", "cat", "ship")


def clouds(count=300, spread=1.0, seed=0):
    """Points around three centres, in channels of very different scales, and their names."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    index = torch.randint(3, (count,), generator=generator)
    points = centres[index] + spread * torch.randn(count, 5, generator=generator)
    return 10 + points * torch.tensor([1e-3, 1.0, 100.0, 1.0, 0.1]), [CLASSES[i] for i in index]


def accuracy(probe, features, labels):
    return sum(one == other for one, other in zip(probe.predict(features), labels, strict=True)) / len(labels)


def test_the_loss_is_as_low_as_another_optimizers():
    features, labels = clouds(spread=3.0)
    probe = fit_linear_probe(features, labels, l2=0.01)
    x = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    y = np.array([CLASSES.index(label) for label in labels])

    def loss(parameters):
        weight, bias = parameters[:15].reshape(3, 5), parameters[15:]
        logits = x @ weight.T + bias
        return np.mean(np.logaddexp.reduce(logits, 1) - logits[np.arange(len(y)), y]) + 0.005 * (weight**2).sum()

    ours = loss(np.concatenate([probe.weight.flatten().numpy(), probe.bias.numpy()]))
    best = minimize(loss, np.zeros(18)).fun
    assert ours == pytest.approx(best, abs=1e-6) and best < 0.9 * loss(np.zeros(18))


def test_held_out_points_get_the_name_of_their_cloud():
    probe = fit_linear_probe(*clouds())
    assert probe.classes == CLASSES and accuracy(probe, *clouds(seed=1)) > 0.98


def test_labels_that_have_nothing_to_do_with_the_features_stay_at_chance():
    features, _ = clouds(600)
    labels = [CLASSES[i] for i in torch.randint(3, (600,), generator=torch.Generator().manual_seed(3))]
    probe = fit_linear_probe(features[:300], labels[:300])
    assert 0.2 < accuracy(probe, features[300:], labels[300:]) < 0.47


@pytest.mark.parametrize(
    ("count", "labels", "options", "message"),
    [
        (2, ["a"], {}, "2 pictures and 1 labels"),
        (2, ["a", "a"], {}, "1 classes"),
        (0, [], {}, "0 classes"),
        (2, ["a", "b"], {"l2": -1.0}, "l2 is -1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(count, labels, options, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(torch.zeros(count, 3), labels, **options)


def test_pooled_features_are_each_images_mean_whatever_the_batch():
    torch.manual_seed(0)
    encoder = VisionEncoder(
        VisionEncoderConfig(
            tile_size=8,
            patch_size=4,
            hidden_size=16,
            intermediate_size=32,
            num_layers=2,
            num_gated_layers=1,
            num_heads=2,
            tap_points=(1,),
        )
    )
    images = [Tiles(torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8), (1, count)) for count in (1, 2, 1, 1, 2)]
    pooled = pooled_features(encoder, images, batch_size=2)
    assert pooled.shape == (5, encoder.config.feature_size)
    for tiles, row in zip(images, pooled, strict=True):
        torch.testing.assert_close(row, encoder([tiles]).mean(0), rtol=1e-4, atol=1e-5)
    fit_linear_probe(pooled, ["a", "b", "a", "b", "a"])  # also of features without gradients
