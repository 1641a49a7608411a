"""Try timm's networks: python benchmarks/networks.py RESULTS.csv [--only ARCH ...] [--markdown FILE]

Each network has random weights and runs in a process of its own. It is built, takes a training step in float32 and one
in bf16, draws a heat map, and is exported to ONNX, whose output in ONNX Runtime and OpenVINO is compared with
PyTorch's. RESULTS.csv gets a row as soon as a network is done; those that it holds are not tried again. `--markdown`
writes the table between the marks of docs/networks.md.
"""
import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch

from aptos_fastai.common.console import plural, say, table
from aptos_fastai.common.io import AptosError, write_bytes, write_csv
from aptos_fastai.deploy.bundle import NetOfSquares, write_onnx
from aptos_fastai.inference.backends import import_openvino
from aptos_fastai.inference.explain import heatmap_layer, hires_cam, layer_maps, layer_outputs
from aptos_fastai.inference.model_spec import MemberSpec
from aptos_fastai.training.networks import TimmBody, create_model
from aptos_fastai.training.outputs import GradeLoss

FAMILIES = dict(
    ViT='vit_tiny_patch16_224 vit_wee_patch16_reg1_gap_256 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 '
        'vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3 eva02_tiny_patch14_224 '
        'eva02_small_patch14_224 beitv2_base_patch16_224 vit_base_patch16_siglip_224 samvit_base_patch16 '
        'naflexvit_base_patch16_gap vitamin_small_224 test_vit',
    variants='cait_xxs24_224 xcit_nano_12_p16_224 crossvit_tiny_240 volo_d1_224 coat_tiny convit_tiny '
             'tnt_s_patch16_224 pit_ti_224 mixer_s32_224 gmixer_12_224 resmlp_12_224 sequencer2d_s '
             'visformer_tiny levit_128s',
    Swin='swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 davit_tiny '
         'gcvit_xxtiny nest_tiny hiera_tiny_224 hieradet_small mvitv2_tiny twins_svt_small twins_pcpvt_small pvt_v2_b0',
    hybrids='coatnet_nano_rw_224 maxvit_nano_rw_256 maxxvit_rmlp_nano_rw_256 caformer_s18 poolformer_s12 fastvit_t8 '
            'mobilevit_xxs mobilevitv2_050 repvit_m0_9 tiny_vit_5m_224 efficientformer_l1 efficientformerv2_s0 '
            'efficientvit_b0 efficientvit_m0 nextvit_small swiftformer_xs csatv2 botnet26t_256 halonet26t '
            'lambda_resnet26t',
    ConvNeXt='convnext_atto convnext_tiny convnextv2_atto convnext_tiny.dinov3_lvd1689m test_convnext '
             'inception_next_atto convmixer_768_32 convformer_s18 mambaout_femto focalnet_tiny_srf edgenext_xx_small',
    MobileNet='mobilenetv3_small_050 tf_mobilenetv3_small_075 mobilenetv4_conv_small lcnet_050 ghostnet_050 '
              'ghostnetv3_050 repghostnet_050 mobileone_s0 hgnetv2_b0 starnet_s1 shvit_s1 fasternet_t0',
    EfficientNet='tf_efficientnet_lite0 efficientnet_b0 tf_efficientnetv2_b0 efficientnetv2_rw_t mnasnet_050 '
                 'hardcorenas_a rexnet_100 mobilenetv2_050 tinynet_e fbnetv3_b',
    RegNet='regnetx_002 regnety_002 regnetz_005 nfnet_l0',
    DenseNet='densenet121 rdnet_tiny dpn48b dla34 vgg11_bn ese_vovnet19b_dw cspresnet50 cspdarknet53 gernet_s '
             'repvgg_a0 hrnet_w18_small xception41 inception_v3 pnasnet5large',
    ResNet='resnet18 resnetv2_18 resnext26ts seresnext26d_32x4d legacy_seresnet50 ecaresnet26t skresnet18 resnest14d '
           'res2net50_14w_8s tresnet_m selecsls42 bat_resnext26ts test_resnet')
SIZES = dict(crossvit_tiny_240=240, halonet26t=256, bat_resnext26ts=256)          # others: SIZE
SIZE = 224
OTHER_SIZES = 252, 256                       # tried too, forward only: multiples of 14 and of 16
SPOT = .25, .7                               # row and column of a spot, as parts of the side
SECONDS, GIGABYTES = 300, 6                  # of processor time and memory, at most, for a network
COLUMNS = 'network family size millions features width head train bf16 heat_map onnx openvino other_sizes'.split()
MEAN_STD = dict(mean=(.485, .456, .406), std=(.229, .224, .225))
MARKS = '<!-- table: benchmarks/networks.py -->', '<!-- end of the table -->'


# One network

def try_network(arch: str) -> dict:
    "Return a row of the table: what works is a figure or `yes`, what does not begins with `no:`"
    torch.manual_seed(0)
    size = SIZES.get(arch, SIZE)
    row: dict = dict(network=arch, size=size)

    def attempt(key: str, check, *args) -> None:
        try: row[key] = check(*args)
        except Exception as e:               # of any library: the table names it
            row[key] = 'no: ' + (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
    try: net = create_model(arch, 'auto', size, loss='corn').to(memory_format=torch.channels_last)
    except AptosError as e: return row | dict(train=f'no: {e}')
    row |= dict(millions=round(sum(p.numel() for p in net.parameters()) / 1e6, 1), head=net[1].pooling,
                width=net[1].channels, features=feature_kind(net[0], size))
    attempt('train', train_step, net, size, False)
    attempt('bf16', train_step, net, size, True)
    net.zero_grad()
    attempt('heat_map', heat_map_size, net.eval(), size)
    attempt('other_sizes', working_sizes, arch)
    return row


def try_export(arch: str) -> dict:
    "Return the columns of the table that say whether ONNX gives what PyTorch gives"
    torch.manual_seed(0)
    size = SIZES.get(arch, SIZE)
    net, squares = create_model(arch, 'avg', size, loss='corn'), random_squares(size)
    member = MemberSpec('', '', arch, 'avg', size, 'none', **MEAN_STD, weight=1., loss='corn')
    take_statistics(net, size)
    expected = torch_outputs(net, member, squares)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'net.onnx'
        try: write_onnx(net, member, file)
        except Exception as e: return dict(onnx=f'no: {first_reason(e)}', openvino='')
        return dict(onnx=difference(expected, onnx_outputs, file, squares),
                    openvino=difference(expected, openvino_outputs, file, squares))


@torch.no_grad()
def take_statistics(net: torch.nn.Module, size: int) -> None:
    "Give batch norms the statistics of a batch of noise: with random weights, values would else vanish or explode"
    for module in net.modules():
        if hasattr(module, 'momentum'): module.momentum = 1.
    net.train()(torch.randn(4, 3, size, size))


def first_reason(e: BaseException) -> str:
    "Return the first line of what an error was caused by"
    while e.__cause__: e = e.__cause__
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


def feature_kind(body: TimmBody, size: int) -> str:
    "Return what timm's network gives"
    body.eval()
    with torch.no_grad(): x = body.timm_features(torch.zeros(1, 3, size, size))
    if isinstance(x, list | tuple): return f'list of {len(x)}'
    if x.ndim == 3: return plural(x.shape[1], 'token')
    return 'maps' if x.shape[1] == body(torch.zeros(1, 3, size, size)).shape[1] else 'maps, channels last'


def train_step(net: torch.nn.Module, size: int, bf16: bool) -> str:
    """Take a training step on four images and return `yes`, and how many parameters got no gradient.

    Raises `AptosError` if the loss or a gradient is not finite.
    """
    images, grades = torch.randn(4, 3, size, size), torch.tensor([0., 1., 2., 4.])
    net.train().zero_grad()
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16): maps = net[0](images)
    loss = GradeLoss('corn')(net[1](maps.float()), grades)
    loss.backward()
    if not torch.isfinite(loss): raise AptosError('loss is not finite')
    wrong = [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if wrong: raise AptosError(f'gradients of {wrong[0]} are not finite')
    unused = sum(p.numel() for p in net.parameters() if p.requires_grad and p.grad is None)
    torch.optim.AdamW(net.parameters(), 1e-4).step()
    return f'yes, {unused:,} unused' if unused else 'yes'


def heat_map_size(net: torch.nn.Module, size: int) -> str:
    "Return the shape of the heat map of an image. Raises `AptosError` if it is 0, not finite, or not in its place"
    layer = heatmap_layer(net)
    hot = hires_cam(net, torch.randn(2, 3, size, size), layer)
    if not hot.isfinite().all() or not hot.abs().amax((1, 2)).min() > 0: raise AptosError('is 0 or not finite')
    if not is_in_place(net, size, layer): raise AptosError('is not where the image is')
    return f'{hot.shape[1]} × {hot.shape[2]}'


@torch.no_grad()
def is_in_place(net: torch.nn.Module, size: int, layer: torch.nn.Module) -> bool:
    "Return whether a spot in an image changes the maps of the layer most where the spot is"
    image = torch.randn(1, 3, size, size)
    spot, (row, column), side = image.clone(), SPOT, size // 8
    y, x = round(row * size), round(column * size)
    spot[..., y - side // 2:y + side // 2, x - side // 2:x + side // 2] += 2
    maps = []
    for im in (image, spot):
        kept, _ = layer_outputs(net, im, {layer, net[0]})
        maps.append(layer_maps(kept.get(layer, kept[net[0]]), net, layer))
    change = (maps[1] - maps[0]).abs().sum(1)[0]
    h, w = change.shape
    v, u = divmod(int(change.argmax()), w)
    return abs((v + .5) / h - row) < .15 and abs((u + .5) / w - column) < .15


def working_sizes(arch: str) -> str:
    "Return those of `OTHER_SIZES` at which the network runs"
    def runs(size: int) -> bool:
        try: create_model(arch, 'avg', size)
        except AptosError: return False
        return True
    return ' '.join(str(size) for size in OTHER_SIZES if runs(size)) or 'no: no other'


# Export

def random_squares(size: int) -> np.ndarray:
    "Return three squares of noise"
    return np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)


def torch_outputs(net: torch.nn.Module, member: MemberSpec, squares: np.ndarray) -> list[np.ndarray]:
    "Return the scores and features of squares in float32"
    with torch.no_grad(): return [o.numpy() for o in NetOfSquares(net, member).eval()(torch.from_numpy(squares))]


def onnx_outputs(file: Path, squares: np.ndarray) -> list[np.ndarray]:
    "Return them by ONNX Runtime"
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return session.run(['score', 'features'], {'squares': squares})


def openvino_outputs(file: Path, squares: np.ndarray) -> list[np.ndarray]:
    "Return them by OpenVINO in float32"
    core = import_openvino().Core()
    model = core.read_model(str(file))
    model.reshape(list(squares.shape))
    result = core.compile_model(model, 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))([squares])
    return [result['score'], result['features']]


def difference(expected: list[np.ndarray], outputs_of: Callable, file: Path, squares: np.ndarray) -> str:
    "Return the largest difference of a score or, relative to the largest, of a feature; `no:` over 0.01 or if it fails"
    try: scores, features = outputs_of(file, squares)
    except Exception as e: return f'no: {first_reason(e)}'
    of_features = np.abs(expected[1] - features).max() / np.abs(expected[1]).max()
    largest = max(np.abs(expected[0] - scores).max(), of_features)
    return f'{largest:.0e}' if largest <= .01 else f'no: differs by {largest:.2g}'


# All networks, each in a process of its own

def in_process(check: Callable[[str], dict], arch: str, failed: str) -> dict:
    "Return what a check finds; a process that is killed, as for too much time or memory, fails in the column `failed`"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context('fork').Process(target=_send, args=(check, arch, sender))
    process.start()
    sender.close()
    try: return receiver.recv()
    except EOFError: return {failed: f'no: the process ended without a result (at most {SECONDS} s and {GIGABYTES} GB)'}
    finally: process.join()


def _send(check: Callable[[str], dict], arch: str, sender) -> None:
    "Run a check with limited memory and send what it finds"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    resource.setrlimit(resource.RLIMIT_CPU, (round(used) + SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30,) * 2)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2): os.dup2(quiet, stream)         # of exporters
    sender.send(check(arch))


def read_results(file: Path) -> pd.DataFrame:
    "Return the rows that there are, by network"
    df = pd.read_csv(file, dtype=str, keep_default_na=False) if file.exists() else pd.DataFrame(columns=COLUMNS)
    return df.set_index('network', drop=False)


def try_all(file: Path, only: list[str]) -> pd.DataFrame:
    "Fill in the columns that the file lacks, or those of the networks `only` again; return all rows"
    families = {arch: family for family, archs in FAMILIES.items() for arch in archs.split()}
    networks = only or list(families)
    for check, column in ((try_network, 'train'), (try_export, 'onnx')):
        for arch in networks:
            df = read_results(file)
            row = df.loc[arch].to_dict() if arch in df.index else dict(network=arch, family=families.get(arch, ''))
            if row.get(column) and not only or column == 'onnx' and not row.get('head'): continue
            start = time.monotonic()
            row |= in_process(check, arch, column)
            write_csv(file, pd.concat([df.drop(index=arch, errors='ignore'), pd.DataFrame([row])])[COLUMNS].fillna(''))
            say(f'{arch}, {column}: {problems(row) or "works"} ({time.monotonic() - start:.0f} s)')
    return read_results(file).reindex([arch for arch in families if arch in read_results(file).index])


def problems(row: dict) -> str:
    "Return what a network fails at"
    return '; '.join(f'{key.replace("_", " ")}: {value[4:]}' for key, value in row.items() if failed(value))


def failed(value: str) -> bool:
    "Return whether an entry of the table says what does not work"
    return str(value).startswith('no: ')


def markdown(df: pd.DataFrame) -> str:
    "Return the table of docs/networks.md"
    heads = ['Network', 'Millions of parameters', 'timm gives', 'Width', '`auto`', 'Heat map', 'Also at',
             'ONNX Runtime', 'OpenVINO', 'Does not work']
    shown = 'millions', 'features', 'width', 'head', 'heat_map', 'other_sizes', 'onnx', 'openvino'
    lines = [heads, ['---'] * len(heads)]
    for row in df.to_dict('records'):
        cells = ['–' if failed(row[key]) else row[key] for key in shown]
        lines.append([f'`{row["network"]}`', *cells, problems(row).replace('|', '\\|')])
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def write_table(page: Path, df: pd.DataFrame) -> None:
    "Replace the table of a page"
    text = page.read_text(encoding='utf-8')
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    if not after: raise SystemExit(f'{page}: has no {MARKS[0]} … {MARKS[1]}')
    failing = sum(bool(problems(row)) for row in df.to_dict('records'))
    count = f'{len(df)} networks; {len(df) - failing} pass every check that is shown. Empty: not tried.'
    write_bytes(page, '\n'.join([before + MARKS[0], count, '', markdown(df), '', MARKS[1] + after]).encode())


def main() -> None:
    "Try networks and print what works"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, metavar='RESULTS.csv')
    parser.add_argument('--only', nargs='+', default=[], metavar='ARCH')
    parser.add_argument('--markdown', type=Path, metavar='FILE')
    args = parser.parse_args()
    df = try_all(args.results, args.only)
    rows = [[row['network'], row['head'], problems(row) or 'works'] for row in df.to_dict('records')]
    table(f'{len(df)} networks', ['network', 'auto', ''], rows, wrap=('',))
    if args.markdown: write_table(args.markdown, df)


if __name__ == '__main__': main()
