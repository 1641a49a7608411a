"""Save the images of the documentation from a finished demo: python docs/scripts/screenshots.py [runs/settings-demo].

Needs Chromium and the extra `test`. Use the synthetic demo only: no photographs of patients in the repository.
"""
import subprocess
import sys
from pathlib import Path
from shutil import which

from playwright.sync_api import Browser, sync_playwright

from aptos_fastai import open_run
from aptos_fastai.common.io import read_record

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / 'docs/images'
PORT = 8765


def save_report(browser: Browser, run_folder: Path) -> None:
    "Save the top of report.html as report.png."
    page = browser.new_page(viewport=dict(width=1000, height=1050))
    page.goto((run_folder / 'report.html').resolve().as_uri())
    page.screenshot(path=IMAGES / 'report.png')


def save_page(browser: Browser, run_folder: Path) -> None:
    "Save the web page with a graded image as page.png."
    run = open_run(ROOT / 'settings.ini', data='demo', runs=run_folder.parent)
    oof = run.oof(run.recipe.submit.final)
    example = oof[oof.diagnosis == 3].iloc[0]
    frame = run.frames[example.source].set_index('id_code')
    command = [sys.executable, str(ROOT / 'run.py'), 'serve', str(run_folder), '--port', str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            while 'http://' not in server.stdout.readline():
                if server.poll() is not None: sys.exit(f'{" ".join(command)}: stopped')
            page = browser.new_page(viewport=dict(width=1000, height=1080))
            page.goto(f'http://127.0.0.1:{PORT}')
            page.set_input_files('#files', frame.path[example.id_code])
            page.wait_for_selector('.result img')
            page.screenshot(path=IMAGES / 'page.png')
        finally: server.terminate()


def main(run_folder: Path) -> None:
    "Save both images."
    summary = read_record(run_folder / 'summary.json')
    if not summary or not summary['synthetic']: sys.exit(f'{run_folder}: not a finished run of the synthetic demo')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=which('chromium') or which('google-chrome'), args=['--no-sandbox'])
        save_report(browser, run_folder)
        save_page(browser, run_folder)
        browser.close()


if __name__ == '__main__': main(Path(sys.argv[1] if len(sys.argv) > 1 else 'runs/settings-demo'))
