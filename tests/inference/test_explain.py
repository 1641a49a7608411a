"Heat maps: what they add up to, where they lie, and that they fall on what a network looks at."
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import fails
from torch import nn

from aptos_fastai.cli import main
from aptos_fastai.data.retina import Circle, Prep, crop_box, crop_square
from aptos_fastai.inference.explain import SIDE, contributions, explained, heat, heat_layer, lay_over
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.views import unview, views
from aptos_fastai.recipe import Stage
from aptos_fastai.training.model import GeM, create_model


@pytest.mark.parametrize('pool', [GeM(3.), GeM(1.), nn.AdaptiveAvgPool2d(1)])
def test_places_add_up_to_the_score(pool):
    torch.manual_seed(0)
    head = nn.Sequential(pool, nn.Flatten(), nn.Linear(6, 1))
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()), head)
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(contributions(net, x, net[0]).mean((1, 2)) + head[2].bias, net(x)[:, 0], atol=1e-4)


def test_a_network_that_sees_one_colour_is_hot_where_that_is():
    body = nn.Conv2d(3, 1, 1, bias=False); body.weight.data[:] = torch.tensor([1., 0, 0])[None, :, None, None]
    net = nn.Sequential(body, nn.Sequential(GeM(3.), nn.Flatten(), nn.Linear(1, 1)))
    net[1][2].weight.data.fill_(1.)
    x = torch.zeros(1, 3, 16, 16); x[0, 0, 3, 12] = 1; x[0, 1, 9, 2] = 1
    assert divmod(int(contributions(net, x, net[0])[0].argmax()), 16) == (3, 12)


@pytest.mark.parametrize('arch', ['test_resnet', 'tf_efficientnet_lite0', 'densenet121', 'legacy_seresnet50'])
def test_the_maps_are_an_eighth_of_the_image(arch):
    net = create_model(Stage('x', ('t',), arch=arch, size=64)).eval()
    out = contributions(net, torch.randn(1, 3, 64, 64), heat_layer(net))
    assert out.shape == (1, 8, 8) and out.abs().max() > 0 and all(p.grad is None for p in net.parameters())


def test_a_score_near_0_is_drawn_faintly():
    im, hot = np.full((50, 50, 3), 90, np.uint8), np.zeros((SIDE, SIDE)); hot[50:60, 50:60] = 1
    strong, faint = (np.abs(lay_over(im, hot, (0, 50, 0, 50), s).astype(int) - im).max() for s in (2., 0.))
    assert strong > 3 * faint > 0


def test_views_are_turned_back():
    x = torch.randn(2, 1, 5, 5)
    for i, v in enumerate(views(x, 'd4')): assert (unview(v, i) == x).all()
    assert i == 7


@pytest.mark.parametrize('prep', [Prep(size=100), Prep(size=100, aspect='squash'), Prep('none', size=100), Prep('none', 'squash', 100)])
def test_heat_lies_where_the_square_shows_it(prep):
    "A spot of the square comes back to its place in the original, whatever the crop"
    im = np.zeros((400, 600, 3), np.uint8)
    cv2.circle(im, (300, 200), 180, (120, 120, 120), -1)
    cv2.circle(im, (380, 120), 9, (255, 255, 255), -1)
    c = Circle(300, 200, 180)
    sq = crop_square(im, c, prep)
    hot = cv2.resize((sq.min(2) > 180).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA) * 9
    out = lay_over(im, hot, crop_box(400, 600, c, prep), 3.).astype(int)
    y, x = np.argwhere(np.abs(out - im).sum(2) > 100).mean(0)
    assert abs(x - 380) < 6 and abs(y - 120) < 6


def test_images_are_explained(toy, photos, tmp_path, capsys):
    (tmp_path / 'bad.png').write_bytes(b'x')
    fails(capsys, ['explain', toy, photos[0], tmp_path / 'bad.png', '-o', tmp_path / 'out'], '1 of 2 images could not be explained', 'bad.png')
    made = list((tmp_path / 'out').iterdir())
    g = load_grader(toy)
    im, over, row = explained(g, Path(photos[0]).read_bytes())
    assert len(made) == 1 and cv2.imread(str(made[0])).shape == (im.shape[0] + 30, 2 * im.shape[1], 3) and im.shape == over.shape
    assert row['score'] == pytest.approx(g.predict(photos[0]).score[0], abs=1e-5)
    squares = g.read(photos[0])[0]
    assert heat(g, {n: s[None] for n, s in squares.items()}).shape == (1, SIDE, SIDE)
    fails(capsys, ['explain', toy], 'name the images, too')
    main(['explain', str(toy), photos[1], photos[1], '-o', str(tmp_path / 'one')])
    assert len(list((tmp_path / 'one').iterdir())) == 1
