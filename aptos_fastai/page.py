"Self-contained HTML pages: no request leaves them; light and dark; they print."
import base64
from html import escape

import cv2
import numpy as np

CSS = """
:root { color-scheme: light dark; --line: light-dark(#d5d9de, #3a4048); --soft: light-dark(#5b6470, #a3adb8); --mark: light-dark(#1f6feb, #6ea8fe); --warn: light-dark(#9a5b00, #e0a84a) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: light-dark(#1c2128, #e4e8ec); background: light-dark(#fff, #16191d) }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem } p.note, caption, figcaption { color: var(--soft); font-size: .87rem }
table { border-collapse: collapse; margin: .6rem 0 } caption { text-align: left; caption-side: bottom; padding-top: .3rem }
th, td { padding: .18rem .7rem .18rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.bar { min-width: 240px; white-space: nowrap } td.bar i { display: inline-block; height: .7em; background: var(--mark); border-radius: 2px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 14px } figure { margin: 0; break-inside: avoid } figure img { display: block; width: 100%; background: #000; border-radius: 4px }
.row { display: flex; gap: 3px; align-items: flex-start } .row img { min-width: 0; height: auto } .warn { color: var(--warn) } .wide { overflow-x: auto }
.synthetic { border: 2px solid var(--warn); color: var(--warn); padding: .4rem .8rem; border-radius: 6px; font-weight: 600 }
@media print { body { max-width: none; margin: 0; background: #fff; color: #000 } h2 { break-after: avoid } }
"""


def page(title: str, body: list[str], *, note: str = '', warning: str = '') -> bytes:
    "A page of `body` (HTML parts); `warning` stands in a frame under the title"
    head = f'<h1>{escape(title)}</h1>' + ''.join(f'<p class={c}>{escape(o)}</p>' for c, o in (('note', note), ('synthetic', warning)) if o)
    meta = '<meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
    return (f'<!doctype html><html lang=en>{meta}<title>{escape(title)}</title><style>{CSS}</style><body>{head}{"".join(body)}</body></html>\n').encode()


def html_table(columns: list[str], rows: list[list], *, caption: str = '') -> str:
    "Numbers align right; a `Bar` is drawn"
    def cell(o):
        if isinstance(o, Bar): return f'<td class=bar>{o.html}</td>'
        return f'<td class=n>{o}</td>' if isinstance(o, (int, float)) else f'<td>{escape(str(o))}</td>'
    head = ''.join(f'<th{" class=n" if rows and isinstance(rows[0][i], (int, float)) else ""}>{escape(c)}</th>' for i, c in enumerate(columns))
    body = ''.join('<tr>' + ''.join(map(cell, r)) + '</tr>' for r in rows)
    return f'<div class=wide><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Bar:
    "A bar of this share of the whole"
    def __init__(self, share: float): self.html = f'<i style="width:{170 * share:.0f}px"></i> {100 * share:.1f} %'


def jpeg(im: np.ndarray, alt: str, quality: int = 85) -> str:
    "An <img> that carries the uint8 RGB picture in itself"
    data = base64.b64encode(cv2.imencode('.jpg', im[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{data}" width={im.shape[1]} height={im.shape[0]} style="flex:{im.shape[1] / im.shape[0]:.3f}">'
