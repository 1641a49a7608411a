"""Draw the imports between the folders of aptos_fastai: python docs/scripts/import_graph.py.

Writes docs/images/import_graph.svg. Blue arrows on the right are needed; grey ones on the left are implied by them.
"""
import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAWING = ROOT / 'docs/images/import_graph.svg'
PACKAGE = 'aptos_fastai'
BOX_WIDTH, BOX_HEIGHT, ROW_HEIGHT, LEFT, TOP, WIDTH = 160, 32, 56, 240, 20, 520     # pixels
ARROW_HEAD = """\
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M 0 0 L 8 4 L 0 8 z" fill="#607d8b"/></marker></defs>"""

Edge = tuple[str, str]                        # (importing folder, imported folder)


def read_layers() -> list[str]:
    "Return the folders of the package, the highest first, as pyproject.toml lists them."
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    return next(c['layers'] for c in config['tool']['importlinter']['contracts'] if c['type'] == 'layers')


def imported_modules(source: str) -> set[str]:
    "Return the full names of the modules that a source file imports from the package."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names |= {f'{PACKAGE}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module: names.add(node.module)
    return {name for name in names if name.startswith(PACKAGE + '.')}


def read_edges(layers: list[str]) -> set[Edge]:
    "Return the imports between different folders."
    edges = set()
    for file in (ROOT / PACKAGE).rglob('*.py'):
        folder = file.relative_to(ROOT / PACKAGE).parts[0].removesuffix('.py')
        if folder not in layers: continue     # the package's own __init__.py
        for module in imported_modules(file.read_text(encoding='utf-8')):
            target = module.split('.')[1]
            if target in layers and target != folder: edges.add((folder, target))
    return edges


def reachable(start: str, edges: set[Edge]) -> set[str]:
    "Return every folder that `start` imports directly or through others."
    found: set[str] = set()
    todo = [start]
    while todo:
        current = todo.pop()
        new = {b for a, b in edges if a == current} - found
        found |= new
        todo += new
    return found


def direct_edges(edges: set[Edge]) -> set[Edge]:
    "Return the edges that no longer path implies (the transitive reduction)."
    direct = set()
    for a, b in edges:
        others = {c for x, c in edges if x == a and c != b}
        if not any(b in reachable(c, edges) for c in others): direct.add((a, b))
    return direct


def arc(a: int, b: int, side: int, style: str) -> str:
    "Return an arrow from row `a` to row `b`, bent to the left (side = -1) or to the right (side = 1)."
    x = LEFT + (BOX_WIDTH if side > 0 else 0)
    y1, y2 = (TOP + row * ROW_HEIGHT + BOX_HEIGHT / 2 + shift for row, shift in ((a, 6), (b, -6)))
    bend = x + side * (14 + 20 * abs(b - a))
    return f'<path d="M {x} {y1} C {bend} {y1}, {bend} {y2}, {x + 2 * side} {y2}" {style} marker-end="url(#head)"/>'


def draw(layers: list[str], edges: set[Edge]) -> str:
    "Return the graph as SVG: boxes from high to low, needed arrows on the right, implied ones on the left."
    direct, row = direct_edges(edges), {name: i for i, name in enumerate(layers)}
    height = 2 * TOP + ROW_HEIGHT * len(layers)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
             ARROW_HEAD,
             f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    for a, b in sorted(edges, key=lambda e: (row[e[0]], row[e[1]])):
        if (a, b) in direct: parts.append(arc(row[a], row[b], 1, 'fill="none" stroke="#1565c0" stroke-width="1.6"'))
        else: parts.append(arc(row[a], row[b], -1, 'fill="none" stroke="#b0bec5" stroke-width="1"'))
    for name, i in row.items():
        y = TOP + i * ROW_HEIGHT
        size = f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}"'
        parts.append(f'<rect x="{LEFT}" y="{y}" {size} rx="5" fill="#e3eef6" stroke="#90a4ae"/>')
        parts.append(f'<text x="{LEFT + BOX_WIDTH / 2}" y="{y + 21}" text-anchor="middle">{escape(name)}</text>')
    return '\n'.join([*parts, '</svg>', ''])


def drawing() -> str:
    "Return docs/images/import_graph.svg."
    layers = read_layers()
    return draw(layers, read_edges(layers))


if __name__ == '__main__': DRAWING.write_text(drawing(), encoding='utf-8')
