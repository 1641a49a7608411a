// An enlarged image in a dialog: wheel, buttons, keys and two fingers change its size; dragging and arrows move it.

const view = { id: null, scale: 1, x: 0, y: 0, fit: 1, width: 1, height: 1, note: '' };
const fingers = new Map();        // of a drag or pinch: pointer id -> position on the stage
const MOST = 16;                  // times the size that fits

function applyView() {
  byId('sheet').style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  byId('zoom_factor').textContent = `${Math.round(100 * view.scale / view.fit)} %`;
}

// Keep the image on the stage: centred where it is smaller, without a gap where it is larger.
function bound(offset, size, room) {
  return size <= room ? (room - size) / 2 : Math.min(0, Math.max(room - size, offset));
}

function moveTo(x, y) {
  const { clientWidth, clientHeight } = byId('stage');
  view.x = bound(x, view.width * view.scale, clientWidth);
  view.y = bound(y, view.height * view.scale, clientHeight);
  applyView();
}

// Change the size; the place (x, y) of the stage stays where it is.
function zoomBy(factor, x = byId('stage').clientWidth / 2, y = byId('stage').clientHeight / 2) {
  const scale = Math.min(Math.max(view.scale * factor, view.fit), MOST * view.fit);
  const k = scale / view.scale;
  view.scale = scale;
  moveTo(x - k * (x - view.x), y - k * (y - view.y));
}

function fit() {
  const { clientWidth, clientHeight } = byId('stage');
  view.scale = view.fit = Math.min(clientWidth / view.width, clientHeight / view.height);
  moveTo(0, 0);
}

// Return the source of the largest image at hand: the file itself if the browser can show it in the same shape.
async function bestImage(result) {
  const graded = await loadImage(result.image);
  if (!result.address) return [graded, result.restored ? 'A smaller copy: the page was loaded again since.' : ''];
  try {
    const own = await loadImage(result.address);
    const shape = image => image.naturalWidth / image.naturalHeight;
    if (Math.abs(shape(own) / shape(graded) - 1) < .01 && own.naturalWidth > graded.naturalWidth) return [own, ''];
  } catch { /* TIFF, DICOM: the browser cannot show the file */ }
  return [graded, ''];
}

async function openZoom(id) {
  const result = results.get(id);
  if (!result?.image) return;
  view.id = id;
  const [image, note] = await bestImage(result);
  if (view.id != id) return;
  const card = cardOf(id);
  Object.assign(image, { alt: `image ${result.row.file}`, draggable: false });
  view.width = image.naturalWidth;
  view.height = image.naturalHeight;
  Object.assign(byId('sheet').style, { width: `${view.width}px`, height: `${view.height}px` });
  byId('sheet').replaceChildren(image);
  const words = DECISIONS[result.row.decision][1];
  byId('zoom_title').textContent = `${result.row.file}: ${words}`;
  view.note = `${view.width} × ${view.height} pixels. ${note}`;
  byId('zoom_note').textContent = view.note;
  byId('zoom_heat').hidden = byId('zoom_strength').hidden = !hasHeat(result);
  if (!byId('zoom').open) byId('zoom').showModal();
  byId('stage').focus();
  fit();
  await zoomHeat(card.dataset.heat == 'yes');
}

async function zoomHeat(show) {
  const result = results.get(view.id);
  if (!result || !hasHeat(result)) return;
  byId('zoom_heat').ariaPressed = String(show);
  byId('sheet').querySelector('canvas')?.remove();
  byId('zoom_note').textContent = view.note;
  if (!show) return;
  const canvas = await heatCanvas(result.heatmap);
  byId('sheet').append(canvas);
  if (canvas.dataset.nothing) byId('zoom_note').textContent = `${NO_REGION} ${view.note}`;
}

const toggleZoomHeat = () => zoomHeat(byId('zoom_heat').ariaPressed != 'true');

function onPointer(event) {
  const place = { x: event.offsetX, y: event.offsetY };
  const box = byId('stage').getBoundingClientRect();
  place.x = event.clientX - box.left;
  place.y = event.clientY - box.top;
  const before = [...fingers.values()];
  const last = fingers.get(event.pointerId);
  if (event.type == 'pointerdown') byId('stage').setPointerCapture(event.pointerId);
  if (event.type == 'pointerdown' || last && event.type == 'pointermove') fingers.set(event.pointerId, place);
  else fingers.delete(event.pointerId);
  if (event.type != 'pointermove' || !last) return;
  if (fingers.size == 1) return moveTo(view.x + place.x - last.x, view.y + place.y - last.y);
  const [a, b] = [...fingers.values()];
  const gap = ([p, q]) => Math.hypot(p.x - q.x, p.y - q.y);
  zoomBy(gap([a, b]) / Math.max(gap(before), 1), (a.x + b.x) / 2, (a.y + b.y) / 2);
}

function onWheel(event) {
  event.preventDefault();
  const box = byId('stage').getBoundingClientRect();
  zoomBy(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
}

const ZOOM_KEYS = {
  '+': () => zoomBy(1.4), '=': () => zoomBy(1.4), '-': () => zoomBy(1 / 1.4), '0': fit, 'h': toggleZoomHeat,
  'z': () => byId('zoom').close(), 'j': () => openZoom(neighbour(view.id, 1)), 'k': () => openZoom(neighbour(view.id, -1)),
  'ArrowLeft': () => moveTo(view.x + 60, view.y), 'ArrowRight': () => moveTo(view.x - 60, view.y),
  'ArrowUp': () => moveTo(view.x, view.y + 60), 'ArrowDown': () => moveTo(view.x, view.y - 60),
};

function setUpZoom() {
  const stage = byId('stage');
  for (const type of ['pointerdown', 'pointermove', 'pointerup', 'pointercancel']) stage.addEventListener(type, onPointer);
  stage.addEventListener('wheel', onWheel, { passive: false });
  stage.addEventListener('dblclick', event => zoomBy(2, event.offsetX, event.offsetY));
  byId('zoom_in').onclick = () => zoomBy(1.4);
  byId('zoom_out').onclick = () => zoomBy(1 / 1.4);
  byId('zoom_fit').onclick = fit;
  byId('zoom_heat').onclick = toggleZoomHeat;
  byId('zoom_close').onclick = () => byId('zoom').close();
  byId('zoom').addEventListener('close', () => {
    const shown = view.id;
    view.id = null;
    focusCard(shown);
  });
  byId('zoom').addEventListener('keydown', event => {
    if (event.target.type == 'range' && event.key.startsWith('Arrow')) return;
    if (event.ctrlKey || event.metaKey || event.altKey || !ZOOM_KEYS[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    ZOOM_KEYS[event.key]();
  });
  window.addEventListener('resize', () => { if (byId('zoom').open) fit(); });
}
