"Heat maps: their sum, their place in the image, and that they lie on what a network sees."
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import expect_error
from torch import nn

from aptos_fastai.cli import main
from aptos_fastai.data.retina import Circle, Prep, crop_box, crop_square
from aptos_fastai.inference.explain import (
    CAPTION_HEIGHT,
    HEATMAP_SIDE,
    explain_image,
    heatmap,
    heatmap_layer,
    hires_cam,
    layer_maps,
    layer_outputs,
    overlay_heatmap,
    side_by_side,
)
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.views import undo_view, views
from aptos_fastai.training.networks import GeM, GradeHead, create_model


class Body(nn.Module):
    "A network as timm's, in its body"
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x): return self.model(x)


@pytest.mark.parametrize('pool', [GeM(3.), GeM(1.), nn.AdaptiveAvgPool2d(1)])
def test_the_mean_over_places_is_the_score_without_bias(pool):
    torch.manual_seed(0)
    net = nn.Sequential(Body(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())), GradeHead('gem', 6, 0, 'mse'))
    net[1][0] = pool
    x = torch.randn(4, 3, 8, 8)
    mean = hires_cam(net, x, net[0]).mean((1, 2))
    assert torch.allclose(mean + net[1][3].bias, net(x)[:, 0], atol=1e-4)


def test_a_network_that_sees_only_red_is_hot_where_red_is():
    body = nn.Conv2d(3, 1, 1, bias=False)
    body.weight.data[:] = torch.tensor([1., 0, 0])[None, :, None, None]
    net = nn.Sequential(Body(body), GradeHead('gem', 1, 0, 'mse'))
    net[1][3].weight.data.fill_(1.)
    red, green = 0, 1
    x = torch.zeros(1, 3, 16, 16)
    x[0, red, 3, 12] = 1
    x[0, green, 9, 2] = 1
    hottest = int(hires_cam(net, x, net[0])[0].argmax())
    assert divmod(hottest, 16) == (3, 12)


@pytest.mark.parametrize('arch', ['test_resnet', 'tf_efficientnet_lite0', 'densenet121', 'legacy_seresnet50'])
def test_the_maps_have_an_eighth_of_the_side(arch):
    net = create_model(arch, 'gem', 64).eval()
    maps = hires_cam(net, torch.randn(1, 3, 64, 64), heatmap_layer(net))
    assert maps.shape == (1, 8, 8) and maps.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize('arch, head, size, side', [
    ('test_vit', 'avg', 128, 8), ('test_vit', 'cls', 128, 8),
    ('swin_tiny_patch4_window7_224', 'avg', 64, 8), ('hiera_tiny_224', 'avg', 224, 28),      # 8 times smaller
    ('hrnet_w18_small', 'gem', 64, 16),                            # a list; the largest of its maps
    ('twins_pcpvt_small', 'avg', 64, 8), ('mvitv2_tiny', 'avg', 64, 8)])                     # timm misnames the layers
def test_the_maps_of_every_kind_of_network_are_where_the_image_is(arch, head, size, side):
    "A spot in an image changes the layer's maps most where the spot is"
    torch.manual_seed(0)
    net = create_model(arch, head, size).eval()
    layer = heatmap_layer(net)
    image = torch.randn(1, 3, size, size)
    hot = hires_cam(net, image, layer)
    assert hot.shape == (1, side, side) and hot.abs().max() > 0
    places, half = [(.25, .7), (.8, .3)], size // 16
    images = image.repeat(3, 1, 1, 1)
    for spotted, (row, column) in zip(images[1:], places, strict=True):
        y, x = round(row * size), round(column * size)
        spotted[..., y - half:y + half, x - half:x + half] += 2
    with torch.no_grad(): before, *after = layer_maps(layer_outputs(net, images, [layer])[0][layer], net, layer)
    for maps, (row, column) in zip(after, places, strict=True):
        v, u = divmod(int((maps - before).abs().sum(0).argmax()), side)
        assert (v + .5) / side == pytest.approx(row, abs=.13) and (u + .5) / side == pytest.approx(column, abs=.13)


def test_a_score_of_one_place_of_a_transformer_is_hot_there():
    "The last layer's maps, when a head weighs only one place: every other place adds nothing"
    net = create_model('test_vit', 'avg', 64).eval()
    place = torch.zeros(1, 1, 4, 4)
    place[..., 2, 1] = 1
    net[1][0] = nn.Sequential(Body(lambda maps: maps * place), nn.AdaptiveAvgPool2d(1))
    hot = hires_cam(net, torch.randn(1, 3, 64, 64), net[0])[0]
    assert divmod(int(hot.abs().argmax()), 4) == (2, 1) and (hot != 0).sum() == 1


def test_layers_that_do_not_reach_the_score_are_replaced_by_the_body():
    net = create_model('test_vit', 'cls', 64).eval()
    unused = nn.Conv2d(3, 2, 1)
    hot = hires_cam(net, torch.randn(1, 3, 64, 64), unused)        # not called
    assert hot.shape == (1, 1, 1)                                  # the class token
    net[0].model.register_forward_pre_hook(lambda model, args: (unused(args[0]), None)[1])
    assert hires_cam(net, torch.randn(1, 3, 64, 64), unused).shape == (1, 1, 1)              # called, not used


def test_a_score_near_0_is_drawn_faintly():
    im, hot = np.full((50, 50, 3), 90, np.uint8), np.zeros((HEATMAP_SIDE, HEATMAP_SIDE))
    hot[50:60, 50:60] = 1

    def strongest_change(score):
        return np.abs(overlay_heatmap(im, hot, (0, 50, 0, 50), score).astype(int) - im).max()
    assert strongest_change(2.) > 3 * strongest_change(0.) > 0


@pytest.mark.parametrize('tta, n', [('none', 1), ('hflip', 2), ('rot4', 4), ('d4', 8)])
def test_views_are_turned_back(tta, n):
    x = torch.randn(2, 1, 5, 5)
    turned_back = [undo_view(v, tta, i) for i, v in enumerate(views(x, tta))]
    assert len(turned_back) == n
    assert all((v == x).all() for v in turned_back)


PREPS = [Prep(size=100), Prep(size=100, aspect='squash'), Prep('none', size=100), Prep('none', 'squash', 100)]


@pytest.mark.parametrize('prep', PREPS)
def test_heat_lies_where_the_square_shows_it(prep):
    "A bright spot of the square returns to its place in the original, whatever the crop"
    im = np.zeros((400, 600, 3), np.uint8)
    cv2.circle(im, (300, 200), 180, (120, 120, 120), -1)
    cv2.circle(im, (380, 120), 9, (255, 255, 255), -1)
    circle = Circle(300, 200, 180)
    spot = (crop_square(im, circle, prep).min(2) > 180).astype(np.float32)
    hot = cv2.resize(spot, (HEATMAP_SIDE, HEATMAP_SIDE), interpolation=cv2.INTER_AREA) * 9
    out = overlay_heatmap(im, hot, crop_box(400, 600, circle, prep), 3.).astype(int)
    y, x = np.argwhere(np.abs(out - im).sum(2) > 100).mean(0)
    assert abs(x - 380) < 6 and abs(y - 120) < 6


def test_explain_writes_an_image_each_and_names_unreadable_ones(toy, image_paths, tmp_path, capsys):
    bad, out = tmp_path / 'bad.png', tmp_path / 'out'
    bad.write_bytes(b'x')
    expect_error(capsys, ['explain', toy, image_paths[0], bad, '-o', out],
                 '1 of 2 images could not be explained', 'bad.png')
    written = list(out.glob('*.png'))
    assert len(written) == 1
    grader = load_grader(toy)
    im, overlay, row = explain_image(grader, Path(image_paths[0]).read_bytes())
    height, width, _ = im.shape
    assert im.shape == overlay.shape
    shape = cv2.imread(str(written[0])).shape
    assert shape[0] == height + 2 * CAPTION_HEIGHT and shape[1] >= 2 * width          # wider for a long caption
    assert row['score'] == pytest.approx(grader.predict(image_paths[0]).score[0], abs=1e-5)
    squares, _ = grader.read(image_paths[0])
    hot = heatmap(grader, {side: square[None] for side, square in squares.items()})
    assert hot.shape == (1, HEATMAP_SIDE, HEATMAP_SIDE)


def test_explain_needs_images_and_draws_each_once(toy, image_paths, tmp_path, capsys):
    expect_error(capsys, ['explain', toy], 'IMAGES')
    main(['explain', str(toy), image_paths[1], image_paths[1], '-o', str(tmp_path)])
    assert len(list(tmp_path.glob('*.png'))) == 1


def test_files_of_the_same_name_are_drawn_under_different_names(toy, image_paths, tmp_path):
    for folder, path in (('a', image_paths[0]), ('b', image_paths[1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'eye.png').write_bytes(Path(path).read_bytes())
    out = tmp_path / 'out'
    main(['explain', str(toy), str(tmp_path / 'a'), str(tmp_path / 'b'), '-o', str(out)])
    assert sorted(f.name for f in out.glob('*.png')) == ['eye-2.png', 'eye.png']


def test_the_caption_of_a_small_image_is_not_cut():
    im = np.zeros((60, 80, 3), np.uint8)
    row = dict(ungradable='', grade=2, grade_low=1, grade_high=3, score=2., flags='dark')
    drawn, wide = side_by_side(im, im, row), side_by_side(np.zeros((60, 800, 3), np.uint8), im, row)
    assert drawn.shape[1] > 160 and wide.shape[1] == 880
    assert np.array_equal(drawn[60:] > 0, wide[60:, :drawn.shape[1]] > 0) and not wide[60:, drawn.shape[1]:].any()
