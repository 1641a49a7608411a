"""Save the images of the documentation from a finished demo: python docs/scripts/screenshots.py [runs/settings-demo].

Needs Chromium and the extra `test`. Use the synthetic demo only: no photographs of patients in the repository. A small
demo is good enough and takes three minutes: python run.py all --set demo.shrink=8
--set "demo.archs=legacy_seresnet50:test_resnet densenet121:test_resnet"
"""
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import pandas as pd
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from rich._export_format import CONSOLE_SVG_FORMAT

from aptos_fastai.cli import main as command_line
from aptos_fastai.common.console import console
from aptos_fastai.common.io import read_record

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / 'docs/images'
PORT = 8765
COLOURS = 200                                # of a PNG: with a palette it has a third of the size
FONT_FACES = re.compile(r'@font-face \{\{.*?\}\}', re.DOTALL)      # rich's, which load from another host
COLUMNS = 104                                # width of the terminal


def save(page: Page, name: str) -> None:
    "Save what a page shows as docs/images/NAME.png"
    Image.open(io.BytesIO(page.screenshot())).convert('RGB').quantize(COLOURS, dither=Image.Dither.NONE).save(
        IMAGES / f'{name}.png', optimize=True)


def save_html(browser: Browser, file: Path, name: str, heading: str = '') -> None:
    "Save the top of an HTML file, or what begins with a heading"
    page = browser.new_page(viewport=dict(width=1000, height=1050))
    page.goto(file.resolve().as_uri())
    if heading: page.get_by_role('heading', name=heading, exact=True).evaluate('o => o.scrollIntoView()')
    save(page, name)


@contextmanager
def server(*command: str) -> Iterator[str]:
    "Run a command that serves a page until the block ends; yield its URL"
    command = (sys.executable, str(ROOT / 'run.py'), *command, '--port', str(PORT))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while 'http://' not in process.stdout.readline():
                if process.poll() is not None: sys.exit(f'{" ".join(command)}: stopped')
            yield f'http://127.0.0.1:{PORT}'
        finally: process.terminate()


def save_serve(browser: Browser, run_folder: Path) -> None:
    "Save the web page with a graded image as page.png"
    oof = pd.read_csv(run_folder / 'oof.csv', dtype=dict(id_code=str))
    severe = oof.id_code[(oof.source == 'aptos_train') & (oof.diagnosis == 3)].iloc[0]
    image = next(run_folder.parent.glob(f'demo-*/*/train_images/{severe}.*'))
    with server('serve', str(run_folder)) as url:
        page = browser.new_page(viewport=dict(width=1000, height=1000))
        page.goto(url)
        page.set_input_files('#files', image)
        page.wait_for_selector('.result img')
        save(page, 'page')


def save_review(browser: Browser, run_folder: Path) -> None:
    "Save the first image of a review as review.png"
    with server('review', str(run_folder), '--reviewer', 'A. Reader') as url:
        page = browser.new_page(viewport=dict(width=1000, height=860))
        page.goto(url)
        page.wait_for_selector('#image[src]')
        page.wait_for_load_state('networkidle')
        save(page, 'review')


def save_terminal(command: list[str]) -> None:
    "Save what a command prints as terminal.svg, which loads no font"
    console.record, console.file, console.width, console.soft_wrap = True, io.StringIO(), COLUMNS, False
    command_line(command)
    svg = console.export_svg(title=f'python run.py {" ".join(command)}', unique_id='terminal',
                             code_format=FONT_FACES.sub('', CONSOLE_SVG_FORMAT))
    (IMAGES / 'terminal.svg').write_text(svg, encoding='utf-8')


def main(run_folder: Path) -> None:
    "Save all images."
    summary = read_record(run_folder / 'summary.json')
    if not summary or not summary['synthetic']: sys.exit(f'{run_folder}: not a finished run of the synthetic demo')
    save_terminal(['all', str(run_folder)])
    inspected = run_folder.parent / 'inspected'                        # in the sizes of settings.ini
    command_line(['inspect', 'aptos_train', '8', '--recipe', str(ROOT / 'settings.ini'), '--data', 'demo', '--runs',
                  str(run_folder.parent), '--name', inspected.name])
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=which('chromium') or which('google-chrome'), args=['--no-sandbox'])
        save_html(browser, run_folder / 'report.html', 'report')
        save_html(browser, inspected / 'inspect/aptos_train.html', 'inspect', 'Images')
        save_serve(browser, run_folder)
        save_review(browser, run_folder)
        browser.close()


if __name__ == '__main__': main(Path(sys.argv[1] if len(sys.argv) > 1 else 'runs/settings-demo'))
