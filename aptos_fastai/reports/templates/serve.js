// The page: a queue of files, the list of results, patients, keyboard.

const queue = [];
const cards = new Map();          // id -> element
let patients = null;              // what /api/patients said, with their results; null if they are not paired
let running = false;
let cancelled = false;
let done = 0;
let total = 0;

const cardOf = id => cards.get(id);
const say = text => { byId('status').textContent = text; };
const plural = (n, noun) => `${n} ${noun}${n == 1 ? '' : 's'}`;

// Grading

async function post(file) {
  const form = new FormData();
  form.append('files', file);
  form.append('heatmap', '1');
  for (let attempt = 0; ; attempt++) {
    const response = await fetch('api/predict', { method: 'POST', body: form });
    const reply = await response.json();
    if (response.status != 503 || attempt == 20 || cancelled) return [response.ok, reply];
    say('The server is busy; trying again …');
    await new Promise(resolve => setTimeout(resolve, 1000 * (response.headers.get('retry-after') ?? 5)));
  }
}

// The row of a file that the server did not grade.
function failed(file, error) {
  const empty = Object.fromEntries(about.columns.map(column => [column, null]));
  return { ...empty, file: file.name, decision: '', error };
}

// Grade one file. Return false if no other one should follow.
async function grade(file) {
  try {
    const [ok, reply] = await post(file);
    if (!ok) return add(file, failed(file, reply.error), null);
    if (identity(reply.audit) != identity(about)) return otherModel(file);
    for (const { image, heatmap, ...row } of reply.rows) add(file, row, reply.audit, image, heatmap);
  } catch (e) {
    add(file, failed(file, `the server did not answer (${e.message})`), null);
  }
}

function otherModel(file) {
  notice('The server now runs another model. Save the results, clear them and load the page again.');
  queue.unshift(file);
  cancelled = true;
}

function add(file, row, audit, image, heatmap) {
  const result = { id: nextId++, row, audit, image, heatmap, address: image ? URL.createObjectURL(file) : null };
  results.set(result.id, result);
  if (!keepRow(result)) notice('This tab has no room left: further results do not survive a reload. Save them as CSV.');
  keepImage(result);
  refresh();
}

async function gradeAll(files) {
  if (foreign) return say('These results are of another model. Clear them first.');
  queue.push(...files);
  total += files.length;
  if (running || !queue.length) return;
  running = true;
  cancelled = false;
  byId('busy').hidden = false;
  while (queue.length && !cancelled) {
    byId('bar').value = done / total;
    byId('count').textContent = `${done} of ${plural(total, 'image')} graded`;
    await grade(queue.shift());
    done++;
  }
  const left = queue.length;
  say(left ? `Cancelled: ${plural(left, 'image')} of ${total} not graded.` : `${plural(total, 'image')} graded.`);
  queue.length = done = total = 0;
  running = false;
  byId('busy').hidden = true;
  byId('files').value = '';
}

function cancel() {
  cancelled = true;
  byId('count').textContent = 'Stopping after this image …';
}

// The list

let waiting = null;

// Pair and draw soon: many results that arrive at once are drawn together.
function refresh() {
  waiting ??= setTimeout(async () => {
    waiting = null;
    decidePairing();
    try { await pairEyes(); } catch (e) {
      patients = null;
      byId('pairing_result').textContent = `patients could not be found (${e.message})`;
    }
    render();
  }, running ? 150 : 0);
}

// What is sorted and filtered: images, or patients and the files that belong to none.
function items() {
  const single = result => ({ results: [result], decision: result.row.decision, name: result.row.file });
  const paired = new Set((patients ?? []).flatMap(patient => patient.results));
  const rest = [...results.values()].filter(result => !paired.has(result)).map(single);
  const found = [...(patients ?? []).map(patient => ({ ...patient, name: patient.patient, isPatient: true })), ...rest];
  return found.map(item => ({ ...item, score: Math.max(...item.results.map(({ row }) => row.score ?? -1)),
    errors: item.results.filter(({ row }) => row.error).length }));
}

const FILTERS = {
  all: ['All', null, () => true],
  refer: ['Refer', 'refer', item => item.decision == 'refer' || item.decision == 'uncertain: refer'],
  no: ['Do not refer', 'no', item => item.decision == 'do not refer'],
  ungradable: ['Not gradable', 'ungradable', item => item.decision == 'not gradable'],
  errors: ['Errors', 'error', item => item.errors > 0],
};

// Return the count of a filter with its words; the unit is that of `all` but for errors, which are always files.
function countOf(key, everything, paired) {
  const [words, , test] = FILTERS[key];
  if (key == 'errors') return [everything.reduce((sum, item) => sum + item.errors, 0), `${words} (files)`];
  const n = everything.filter(item => test(item) && Boolean(item.isPatient) == paired).length;
  if (key == 'all') return [n, `All ${paired ? 'patients' : 'images'}`];
  return [n, paired && key == 'ungradable' ? 'Not gradable or incomplete' : words];
}

// Return the words of the decision on a patient: an eye without an image is to be photographed.
function patientWords({ decision, missing, ungradable }) {
  if (decision != 'not gradable' || !missing) return DECISIONS[decision][1];
  if (ungradable) return 'Not gradable: photograph both eyes';
  return `Incomplete: photograph ${missing.includes(' ') ? 'both eyes' : `the ${missing} eye`}`;
}
const SORTS = {
  arrival: () => 0,
  decision: (a, b) => ORDER.indexOf(a.decision) - ORDER.indexOf(b.decision) || b.score - a.score,
  score: (a, b) => b.score - a.score,
  file: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
};

function fits(item) {
  const text = settings.search.trim().toLowerCase();
  const names = [item.name, ...item.results.map(({ row }) => row.file)];
  return FILTERS[settings.filter][2](item) && (!text || names.some(name => name.toLowerCase().includes(text)));
}

function card(result) {
  if (!cards.has(result.id)) cards.set(result.id, createCard(result));
  return cards.get(result.id);
}

function eyeTexts(patient) {
  const eyes = ['right', 'left'].filter(side => patient[`${side}_grade`] != null)
    .map(side => `${side} eye: ${gradeName(patient[`${side}_grade`])} (grade ${patient[`${side}_grade`]})`);
  if (patient.missing) eyes.push(`missing: ${patient.missing.split(' ').join(' and ')} eye`);
  if (patient.ungradable) eyes.push(`not gradable: ${patient.ungradable}`);
  return eyes.join(' · ');
}

function patientGroup(patient) {
  const grid = element('div', { className: 'grid-of-results' }, ...patient.results.map(card));
  if (!patient.named) return element('div', { className: 'patient' }, grid);
  const [name] = DECISIONS[patient.decision];
  const words = patientWords(patient);
  const title = `Patient ${patient.patient}`;
  const p = patient.p_referable == null ? '' : ` · probability of referable retinopathy ${percent(patient.p_referable)}`;
  const header = element('header', {}, element('h2', { textContent: title }), decisionLine(patient.decision, 'p', words),
    lookCaution(patient),
    element('p', { className: 'note', textContent: eyeTexts(patient) + p }));
  return element('section', { className: `patient ${name}`, ariaLabel: `${title}: ${words}` }, header, grid);
}

function render() {
  const focused = document.activeElement;
  const everything = items();
  const shown = everything.filter(fits).sort(SORTS[settings.sort]);
  const paired = Boolean(patients);
  byId('tools').hidden = !results.size;
  byId('pairing').hidden = byId('patients_csv').hidden = !settings.pair;
  if (paired) byId('results').replaceChildren(...shown.map(patientGroup));
  else byId('results').replaceChildren(element('div', { className: 'grid-of-results' }, ...shown.map(o => card(o.results[0]))));
  byId('nothing').hidden = Boolean(shown.length) || !results.size;
  const list = visible();
  for (const node of list) node.tabIndex = -1;
  if (list.length) (list.includes(focused) ? focused : list[0]).tabIndex = 0;
  if (focused?.isConnected && byId('results').contains(focused)) focused.focus({ preventScroll: true });
  showControls();
  showSummary(everything, paired);
}

function showControls() {
  byId('pair').checked = Boolean(settings.pair);
  byId('sort').value = settings.sort;
  byId('ignore').checked = settings.ignore;
  for (const id of ['pattern', 'search']) {
    if (document.activeElement != byId(id)) byId(id).value = settings[id];
  }
  document.documentElement.style.setProperty('--strength', settings.strength / 100);
  for (const slider of document.querySelectorAll('.strength')) slider.value = settings.strength;
}

function showSummary(everything, paired) {
  const buttons = Object.entries(FILTERS).map(([key, [, name]]) => {
    const [n, words] = countOf(key, everything, paired);
    const button = element('button', { className: name ?? '', ariaPressed: String(settings.filter == key) },
      name && icon(name), element('b', { textContent: n }), words);
    button.onclick = () => change({ filter: key });
    return button;
  });
  const rows = [...results.values()].map(({ row }) => row);
  const count = decision => rows.filter(row => row.decision == decision).length;
  const uncertain = count('uncertain: refer');
  const images = `${plural(rows.length, 'image')}: ${count('refer') + uncertain} refer` +
    `${uncertain ? ` (${uncertain} uncertain)` : ''}, ` +
    `${count('do not refer')} do not refer, ${count('not gradable')} not gradable, ${plural(count(''), 'error')}`;
  const unit = paired
    ? `The counts above are of ${plural(patients.length, 'patient')}, by the worse eye; errors are files, and an image ` +
      `without a patient counts as one. In all ${images}.` : `${images}.`;
  const focused = [...byId('summary').children].indexOf(document.activeElement);
  byId('summary').replaceChildren(...buttons, element('p', { textContent: unit }));
  if (focused >= 0) byId('summary').children[focused].focus();
}

function change(values) {
  Object.assign(settings, values);
  keepSettings();
  refresh();
}

function notice(text) {
  byId('notice').textContent = text;
  byId('notice').hidden = !text;
}

function clear() {
  queue.length = 0;
  cancelled = true;
  forget();
  cards.clear();
  known.clear();
  patients = null;
  Object.assign(settings, { pair: null, pattern: '', filter: 'all', search: '' });
  keepSettings();
  notice('');
  say('Cleared.');
  render();
  byId('files').disabled = false;
  byId('files').focus();
}

// Saving

const rowsOf = () => [...results.values()].map(({ row }) => row);

function saveJson() {
  const rows = [...results.values()].map(({ row, audit }) => ({ ...row, audit }));
  const record = { saved: new Date().toISOString(), model: shownModel(), rows };
  if (patients) Object.assign(record, { patients: patients.map(({ results: ofPatient, named, ...patient }) => patient),
    pattern: settings.pattern, missing_eye: settings.ignore ? 'ignore' : 'ungradable' });
  save('grades.json', JSON.stringify(record, null, 1) + '\n', 'application/json');
}

// Keyboard

const visible = () => [...document.querySelectorAll('#results .result')];

function focusCard(id) {
  const node = cards.get(id);
  if (!node?.isConnected) return;
  for (const other of visible()) other.tabIndex = -1;
  node.tabIndex = 0;
  node.focus();
  node.scrollIntoView({ block: 'nearest' });
}

const idOf = node => Number(node?.dataset.id);
const current = () => document.activeElement?.closest?.('.result');

// Return the id of the result that is `step` after another one; the same one at the ends.
function neighbour(id, step) {
  const ids = visible().map(idOf);
  const i = ids.indexOf(id);
  return ids[i < 0 ? 0 : Math.min(Math.max(i + step, 0), ids.length - 1)];
}

const toggleHeat = node => node && showHeat(node, !node.dataset.heat);

function toggleAllHeat() {
  const show = !visible().some(node => node.dataset.heat);
  for (const node of visible()) showHeat(node, show);
}

const KEYS = {
  'j': () => focusCard(neighbour(idOf(current()), 1)),
  'k': () => focusCard(neighbour(idOf(current()), -1)),
  'h': () => toggleHeat(current() ?? visible()[0]),
  'H': toggleAllHeat,
  'z': () => openZoom(idOf(current() ?? visible()[0])),
  '/': () => byId('search').focus(),
  '?': () => byId('help').showModal(),
};

function onKey(event) {
  const typing = event.target.matches('input:not([type=checkbox], [type=range], [type=file]), select, textarea');
  if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
  const arrows = event.target.matches('.result') ? { ArrowDown: 'j', ArrowUp: 'k', Enter: 'z' } : {};
  const action = KEYS[arrows[event.key] ?? event.key];
  if (!action || !results.size && event.key != '?') return;
  event.preventDefault();
  action();
}

// Start

function onDrag(event, over) {
  event.preventDefault();
  byId('drop').classList.toggle('over', over);
}

// Return the files of a drop, those of folders, too; names that begin with a dot are left out.
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some(entry => entry.isDirectory)) return [...transfer.files];
  return (await Promise.all(entries.map(filesBelow))).flat();
}

async function filesBelow(entry) {
  if (entry.name.startsWith('.')) return [];
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const reader = entry.createReader();
  const below = [];
  for (;;) {                      // each call reads at most a hundred entries
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    below.push(...some);
  }
  below.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  return (await Promise.all(below.map(filesBelow))).flat();
}

function onClick(event) {
  const node = event.target.closest('.result');
  if (!node) return;
  if (event.target.closest('.heatmap')) toggleHeat(node);
  if (event.target.closest('.frame, .enlarge')) openZoom(idOf(node));
}

function onStrength(event) {
  if (!event.target.matches('.strength')) return;
  settings.strength = Number(event.target.value);
  keepSettings();
  showControls();
}

function setUp() {
  const drop = byId('drop');
  drop.addEventListener('dragover', event => onDrag(event, true));
  drop.addEventListener('dragleave', event => onDrag(event, false));
  drop.addEventListener('drop', event => {
    onDrag(event, false);
    droppedFiles(event.dataTransfer).then(gradeAll);
  });
  byId('files').onchange = event => gradeAll([...event.target.files]);
  byId('cancel').onclick = cancel;
  byId('clear').onclick = clear;
  byId('csv').onclick = () => save('grades.csv', csvOf(about.columns, rowsOf()), 'text/csv');
  byId('patients_csv').onclick = () => save('patients.csv', csvOf(patientColumns, patients ?? []), 'text/csv');
  byId('json').onclick = saveJson;
  byId('keys').onclick = () => byId('help').showModal();
  byId('sort').onchange = event => change({ sort: event.target.value });
  byId('search').oninput = event => change({ search: event.target.value });
  byId('pair').onchange = event => change({ pair: event.target.checked });
  byId('pattern').onchange = event => change({ pattern: event.target.value });
  byId('ignore').onchange = event => change({ ignore: event.target.checked });
  byId('detect').onclick = () => change({ pattern: detected()[1] });
  byId('results').addEventListener('click', onClick);
  document.addEventListener('input', onStrength);
  document.addEventListener('keydown', onKey);
  setUpZoom();
  restore();
  showControls();
  if (foreign) {
    notice(`These results were made by another model: ${foreign.model} (${foreign.key}), aptos-fastai ${foreign.aptos_fastai}, ` +
      `${foreign.backend} ${foreign.precision}. Save or clear them before you grade images with the present one.`);
    byId('files').disabled = true;
  }
  if (results.size) {
    say(`${plural(results.size, 'result')} from before the reload.`);
    refresh();
  }
}

setUp();
