// Results, and what of them survives a reload: session storage, which belongs to this tab and ends with it.

const results = new Map();        // id -> { id, row, audit, image, heatmap, address }
const settings = { pair: null, pattern: '', ignore: false, sort: 'arrival', filter: 'all', search: '', strength: 75 };
const ROW = 'result.';
const IMAGE = 'image.';
const MODEL = 'model';
const PREVIEW = 512;              // longest side of an image that is kept, pixels
let nextId = 1;
let foreign = null;               // the model that made the kept results, if it is not the model of this page

// What must be equal for results to stand side by side.
const identity = o => [o.digests.model, o.aptos_fastai, o.backend, o.precision, o.prevalence ?? null].join(' ');

function keep(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch { return false; }
}

function recall(key) {
  try { return JSON.parse(sessionStorage.getItem(key)); } catch { return null; }
}

function keptKeys(prefix) {
  try { return Object.keys(sessionStorage).filter(key => key.startsWith(prefix)); } catch { return []; }
}

// Keep a row; images of earlier results make room for it. Return false if there is no room left.
function keepRow(result) {
  keep(MODEL, about);
  while (!keep(ROW + result.id, { row: result.row, audit: result.audit })) {
    const [oldest] = keptKeys(IMAGE).sort((a, b) => a.slice(IMAGE.length) - b.slice(IMAGE.length));
    if (!oldest) return false;
    sessionStorage.removeItem(oldest);
  }
  return true;
}

// Keep a smaller copy of the image, if there is room.
async function keepImage(result) {
  if (!result.image) return;
  const image = await smaller(result.image);
  if (results.has(result.id)) keep(IMAGE + result.id, { image, heatmap: result.heatmap });
}

async function loadImage(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

async function smaller(source) {
  const image = await loadImage(source);
  const scale = Math.min(1, PREVIEW / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = document.createElement('canvas');
  canvas.width = Math.round(scale * image.naturalWidth);
  canvas.height = Math.round(scale * image.naturalHeight);
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/jpeg', .85);
}

const keepSettings = () => keep('settings', settings);

// Read what an earlier load of this page kept.
function restore() {
  Object.assign(settings, recall('settings') ?? {});
  const model = recall(MODEL);
  if (model && identity(model) != identity(about)) foreign = model;
  const ids = keptKeys(ROW).map(key => Number(key.slice(ROW.length))).sort((a, b) => a - b);
  for (const id of ids) {
    const kept = recall(ROW + id);
    if (kept) results.set(id, { id, row: kept.row, audit: kept.audit, ...recall(IMAGE + id), restored: true });
  }
  nextId = Math.max(0, ...ids) + 1;
}

function forget() {
  for (const result of results.values()) if (result.address) URL.revokeObjectURL(result.address);
  results.clear();
  foreign = null;
  for (const key of [MODEL, ...keptKeys(ROW), ...keptKeys(IMAGE)]) sessionStorage.removeItem(key);
}

// Quote a cell for a CSV as `predict` writes it; a text that a spreadsheet would run as a formula gets an apostrophe.
function csvCell(value) {
  if (typeof value == 'number') return Number.isInteger(value) ? String(value) : value.toFixed(4);
  let text = String(value ?? '');
  if (formulaStarts.some(start => text.startsWith(start))) text = "'" + text;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csvOf(columns, rows) {
  return [columns, ...rows.map(row => columns.map(column => row[column]))]
    .map(cells => cells.map(csvCell).join(',') + '\n').join('');
}

function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element('a', { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}
