// The card of a result: decision, grade, probability, score on the bar of grades, heat map.

const percent = p => p > .995 ? '>\u00a099\u00a0%' : p < .005 ? '<\u00a01\u00a0%' : `${Math.round(100 * p)}\u00a0%`;
const gradeName = grade => about.grade_names[grade];
const capital = text => text.charAt(0).toUpperCase() + text.slice(1);
const shownModel = () => foreign ?? about;

const DECISIONS = {
  'refer': ['refer', 'Refer'],
  'uncertain: refer': ['uncertain', 'Uncertain: refer'],
  'do not refer': ['no', 'Do not refer'],
  'not gradable': ['ungradable', 'Not gradable: re-photograph'],
  '': ['error', 'Cannot be read'],
};
const ORDER = Object.keys(DECISIONS);

function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  use.setAttribute('href', `#icon-${name}`);
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  svg.append(use);
  return svg;
}

const LOOK_FROM = .2;             // probability of referable retinopathy of an image that is not referred

// What a person should look at although it is not referred: the probability is high, or the prediction set disagrees.
function lookCaution({ decision, p_referable: p, grade_high: high }) {
  if (decision != 'do not refer' || p == null) return null;
  const likely = p >= LOOK_FROM;
  if (!likely && !(high >= 2)) return null;
  const cause = likely ? '' : `, but the prediction set reaches grade ${high}`;
  return element('p', { className: 'caution look',
    textContent: `Probability of referable retinopathy ${percent(p)}${cause}: look at the image.` });
}

function decisionLine(decision, tag = 'p', words = DECISIONS[decision][1]) {
  const [name] = DECISIONS[decision];
  const unbroken = words.split(/(?<= )/).map(textContent => element('span', { className: 'unbroken', textContent }));
  return element(tag, { className: `decision ${name}` }, icon(name), element('span', {}, ...unbroken));
}

// What a decision says against the grade or the prediction set, so that nobody takes it for an error.
function cautions(row) {
  const texts = [];
  const said = row.p_referable < LOOK_FROM;            // by `lookCaution`
  if (row.decision == 'do not refer' && row.grade_high >= 2 && !said) {
    texts.push('Uncertain: prediction set reaches grade 2.');
  }
  if (row.decision == 'do not refer' && row.grade >= 2) {
    texts.push(`Grade ${row.grade}, but the score is below the operating point: the decision counts.`);
  }
  if (row.decision == 'refer' && row.grade < 2) {
    texts.push(`Grade ${row.grade}, but the score has reached the operating point: the decision counts.`);
  }
  if (row.decision == 'uncertain: refer') {
    texts.push('The score is below the operating point, but the prediction set reaches grade 2.');
  }
  if (row.flags) texts.push(`Check the image quality: ${row.flags}.`);
  return texts.map(textContent => element('p', { className: 'caution', textContent }));
}

function gradeLine(row) {
  return element('p', { className: 'grade', textContent: `${capital(row.grade_name)} (grade ${row.grade})` });
}

function probabilityLine(row) {
  if (row.p_referable == null) return null;
  return element('p', {}, 'Probability of referable retinopathy ', element('b', { textContent: percent(row.p_referable) }),
    `, sight-threatening ${percent(row.p_sight_threatening)}`);
}

function operatingLine(row) {
  const texts = [];
  if (row.sight_threatening == 'yes') texts.push('Called sight-threatening (grade 3 or above).');
  if (row.referable_high_specificity) {
    texts.push(`At high specificity: ${row.referable_high_specificity == 'yes' ? 'refer' : 'do not refer'}.`);
  }
  return texts.length ? element('p', { textContent: texts.join(' ') }) : null;
}

function setText(row) {
  if (row.grade_low == row.grade_high) return `grade ${row.grade_low}`;
  return `grades ${row.grade_low} to ${row.grade_high}`;
}

// Place a text of a row above or below the bar so that it stays inside.
function at(position, textContent) {
  return element('span', { textContent, style: `left:${position}%; transform:translateX(-${position}%)` });
}

// Name the grades in two rows that no line crosses: numbers above the bar, names with their colours below it.
function gradeNumbers(ends) {
  return element('div', { className: 'numbers' }, ...gradeColours.map((_, grade) => element('span', {
    textContent: grade, style: `left:${(ends[grade] + ends[grade + 1]) / 2}%` })));
}

function gradeNames() {
  return element('div', { className: 'names' }, ...gradeColours.map(([light, dark], grade) => element('span', {},
    element('i', { style: `background:light-dark(${light}, ${dark})` }), `${grade} ${gradeName(grade)}`)));
}

// Draw the score on the bar of grades, with the prediction set as a bracket and the operating points as dashed lines.
function scoreBar(row) {
  const { thresholds, operating_points: points } = shownModel();
  const low = Math.min(-.25, thresholds[0] - .4);
  const high = Math.max(4.25, thresholds[3] + .4);
  const x = score => 100 * (Math.min(Math.max(score, low), high) - low) / (high - low);
  const ends = [low, ...thresholds, high].map(x);
  const referable = points.filter(point => point.name == 'referable');
  const label = `score ${row.score.toFixed(2)}, grade ${row.grade} ${row.grade_name}, prediction set ${setText(row)}` +
    referable.map((point, i) => `, ${pointText(point, i)}`).join('');
  const bands = gradeColours.map(([light, dark], grade) => element('div', {
    className: 'band', style: `width:${ends[grade + 1] - ends[grade]}%; background:light-dark(${light}, ${dark})` }));
  const set = [ends[row.grade_low], ends[row.grade_high + 1]];
  const lines = referable.map((point, i) => element('i', {
    className: i ? 'point second' : 'point', style: `left:${x(point.threshold)}%` }));
  const score = at(x(row.score), `score ${row.score.toFixed(2)}`);
  score.className = 'value';
  const labels = node => element('div', { className: 'labels' }, node);
  return element('div', { className: 'score', role: 'img', ariaLabel: label },
    ...referable.map((point, i) => labels(at(x(point.threshold), pointText(point, i)))).reverse(),
    gradeNumbers(ends),
    element('div', {}, ...lines, element('i', { className: 'needle', style: `left:${x(row.score)}%` }),
      element('div', { className: 'bands' }, ...bands)),
    element('div', {}, element('i', { className: 'marker', style: `left:${x(row.score)}%` })), labels(score),
    element('div', { className: 'set' }, element('i', { style: `left:${set[0]}%; right:${100 - set[1]}%` })),
    labels(at((set[0] + set[1]) / 2, `prediction set: ${setText(row)}`)), gradeNames());
}

const pointText = (point, i) => `${i ? 'at high specificity ' : ''}refer from ${point.threshold.toFixed(2)}`;

// Heat maps

const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121],
  [109, 205, 89], [180, 222, 44], [253, 231, 37]];

function viridis(value) {
  const position = value * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(position), VIRIDIS.length - 2);
  return VIRIDIS[i].map((from, channel) => from + (position - i) * (VIRIDIS[i + 1][channel] - from));
}

const VISIBLE = 8;                // grey of 255 from which a place of a heat map can be seen
const NO_REGION = 'No region raised the score.';

// Draw a grey heat map in colour on a new canvas: bright where it raises the score, transparent where it does not.
// `canvas.dataset.nothing` is 'yes' if none of it can be seen.
async function heatCanvas(source) {
  const image = await loadImage(source);
  const canvas = element('canvas', { width: image.naturalWidth, height: image.naturalHeight, className: 'heat' });
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  let brightest = 0;
  for (let i = 0; i < pixels.data.length; i += 4) {
    brightest = Math.max(brightest, pixels.data[i]);
    const value = pixels.data[i] / 255;
    pixels.data.set([...viridis(value), 255 * value ** .8], i);
  }
  context.putImageData(pixels, 0, 0);
  if (brightest < VISIBLE) canvas.dataset.nothing = 'yes';
  return canvas;
}

function strengthSlider() {
  return element('input', { type: 'range', min: 0, max: 100, value: settings.strength, className: 'strength',
    ariaLabel: 'strength of the heat map, percent' });
}

function legend() {
  return element('div', { className: 'legend' },
    element('i', { ariaHidden: 'true' }),
    element('span', { textContent: 'Brighter: raises the score more' }),
    element('label', {}, 'Strength ', strengthSlider()));
}

const nothingLegend = () => element('p', { className: 'legend', textContent: NO_REGION });

const hasHeat = result => Boolean(result.heatmap) && !result.row.error && !result.row.ungradable;

// Show or hide the heat map of a card.
async function showHeat(card, show) {
  const result = results.get(Number(card.dataset.id));
  if (!result || !hasHeat(result)) return;
  card.dataset.heat = show ? 'yes' : '';
  const button = card.querySelector('.heatmap');
  button.ariaPressed = String(show);
  card.querySelector('.legend')?.remove();
  card.querySelector('canvas')?.remove();
  if (!show) return;
  result.canvas ??= await heatCanvas(result.heatmap);
  if (!card.dataset.heat || card.querySelector('canvas')) return;
  card.querySelector('.image').append(result.canvas.dataset.nothing ? nothingLegend() : legend());
  card.querySelector('.frame').append(result.canvas);
}

// Cards

function imageFrame(result) {
  if (!result.image) return null;
  const img = element('img', { src: result.image, alt: `image ${result.row.file}` });
  const frame = element('button', { className: 'frame', ariaLabel: `enlarge ${result.row.file}` }, img);
  return element('div', { className: 'image' }, frame);
}

function details(result) {
  const { row } = result;
  const facts = [];
  if (row.score != null) facts.push(`Score ${row.score.toFixed(4)}, SD ${row.score_sd.toFixed(4)}.`);
  if (row.p_0 != null) {
    facts.push('Probabilities: ' + about.grade_names.map((name, i) => `${name} ${percent(row[`p_${i}`])}`).join(', ') + '.');
  }
  const body = element('div', {}, ...facts.map(textContent => element('p', { textContent })));
  if (row.image_sha256) {
    body.append(element('p', {}, 'SHA-256 of the image ', element('code', { textContent: row.image_sha256 })));
  }
  if (result.audit) {
    const { model, digests, aptos_fastai: version, backend, precision, time } = result.audit;
    body.append(element('p', {
      textContent: `${model} (${digests.model}), aptos-fastai ${version}, ${backend} ${precision}, ${time}` }));
  }
  return body.childNodes.length ? element('details', {}, element('summary', { textContent: 'Details' }), body) : null;
}

function actions(result) {
  if (!result.image) {
    const kept = result.restored && result.row.image_sha256 && !result.row.error;
    if (!kept) return null;
    return element('p', { className: 'note', textContent: 'The image was not kept: choose the file again to see it.' });
  }
  const heat = hasHeat(result) ? element('button', { className: 'heatmap', ariaPressed: 'false', textContent: 'Heat map' }) : null;
  return element('p', { className: 'actions' }, heat, heat ? ' ' : null,
    element('button', { className: 'enlarge', textContent: 'Enlarge' }));
}

// What stands below the decision.
function body(row) {
  if (row.error) return [element('p', { className: 'warn', textContent: row.error })];
  if (row.ungradable) {
    const counts = shownModel().gate.ungradable == 'refer' ? ' If that fails, it counts as referable.' : '';
    return [element('p', { textContent: `No grade: ${row.ungradable}. Photograph the eye again.${counts}` }),
      row.flags ? element('p', { className: 'note', textContent: `Image quality: ${row.flags}` }) : null];
  }
  return [gradeLine(row), probabilityLine(row), operatingLine(row), scoreBar(row), ...cautions(row)];
}

function createCard(result) {
  const { row } = result;
  const [name, words] = DECISIONS[row.decision];
  const text = element('div', {}, decisionLine(row.decision, 'h3'), lookCaution(row), element('p', { className: 'file', textContent: row.file }),
    ...body(row), actions(result), details(result));
  const card = element('article', { className: `result ${name}`, tabIndex: -1, ariaLabel: `${row.file}: ${words}` },
    imageFrame(result), text);
  card.dataset.id = result.id;
  return card;
}
