// Patients: which images belong together by their names, and what the server says of them.

// Candidates for the pattern of file names; the one that gives most images a patient and an eye is taken.
const EYES = 'left|right|od|os|[lr]';
const PATTERNS = [
  `^(?<patient>.+?)(?:[ _.-]+|(?<=[0-9]))(?<eye>${EYES})(?=[^a-z]|$)`,
  `^(?<eye>${EYES})[ _.-]+(?<patient>[^.]+)`,
];
const PATIENTS_AT_ONCE = 200;     // in one request
const EYE_ORDER = { right: 0, od: 0, r: 0, left: 1, os: 1, l: 1 };

function parse(pattern, file) {
  const found = new RegExp(pattern, 'i').exec(file);
  if (!found) return { patient: '', eye: '' };
  const { patient, eye } = found.groups ?? { patient: found[1], eye: found[2] };
  return { patient: (patient ?? '').trim(), eye: (eye ?? '').trim() };
}

// Return patient and eye of an image: DICOM tags win over the pattern of file names.
function person(pattern, row, several) {
  const named = parse(pattern, row.file);
  const patient = row.patient && several && row.issuer ? `${row.patient} (${row.issuer})` : row.patient;
  return { patient: patient || named.patient, eye: row.eye || named.eye };
}

// Whether the tags of the results name several issuers: then the same key can be two patients.
function severalIssuers() {
  const rows = [...results.values()].map(({ row }) => row).filter(row => row.patient);
  return new Set(rows.map(row => row.issuer ?? '')).size > 1;
}

function matches(pattern) {
  return [...results.values()].filter(({ row }) => person(pattern, row).eye).length;
}

const detected = () => PATTERNS.map(pattern => [matches(pattern), pattern]).sort((a, b) => b[0] - a[0])[0];

// Turn pairing on if a name shows an eye, unless the user has decided.
function decidePairing() {
  const [n, pattern] = detected();
  if (!settings.pattern) settings.pattern = n ? pattern : PATTERNS[0];
  if (settings.pair == null && n) settings.pair = true;
}

let asked = 0;                    // how often patients were asked for: an answer that another one overtook is dropped
const known = new Map();          // key of a patient -> what the server said of these images with these options

async function pairEyes() {
  const question = ++asked;
  const found = await askPatients();
  if (question == asked) patients = found;
}

// Return the results by patient: key -> list of result, patient and eye. An image without a patient stands alone;
// a file that cannot be read and names no patient is none.
function byPatient() {
  const groups = new Map();
  const several = severalIssuers();
  for (const result of results.values()) {
    const { patient, eye } = person(settings.pattern, result.row, several);
    if (result.row.error && !patient) continue;
    const key = patient || `image ${result.row.file}`;
    groups.set(key, [...groups.get(key) ?? [], { result, patient, eye }]);
  }
  return groups;
}

// Return the patients of the results, null if they are not paired. The server is asked only about those that changed.
async function askPatients() {
  if (!settings.pair || !results.size) return null;
  let groups;
  try { groups = byPatient(); } catch (e) {
    byId('pairing_result').textContent = `not a valid pattern (${e.message})`;
    return null;
  }
  const signature = group => JSON.stringify([settings.ignore, group.map(o => [o.result.id, o.patient, o.eye])]);
  const changed = [...groups].filter(([key, group]) => known.get(key)?.signature != signature(group));
  for (let i = 0; i < changed.length; i += PATIENTS_AT_ONCE) {
    const part = changed.slice(i, i + PATIENTS_AT_ONCE);
    const answers = await postPatients(part.map(([, group]) => group));
    part.forEach(([key, group], j) => known.set(key, { signature: signature(group), answer: answers[j] }));
  }
  const named = [...groups.values()].flat();
  byId('pairing_result').textContent = `${named.filter(o => o.patient).length} of ${plural(named.length, 'image')} ` +
    `have a patient, ${named.filter(o => o.eye).length} an eye`;
  return [...groups].map(([key, group]) => withImages(known.get(key).answer, group));
}

// Return what the server says of groups of images, one patient each.
async function postPatients(groups) {
  const rows = groups.flat().map(({ result, patient, eye }) => ({ ...result.row, patient, eye }));
  const missing_eye = settings.ignore ? 'ignore' : 'ungradable';
  const response = await fetch('api/patients', { method: 'POST', headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ rows, missing_eye }) });
  const reply = await response.json();
  if (!response.ok) throw new Error(reply.error);
  return reply.patients;
}

// Return a patient with its results, the right eye first, as if facing the patient. `images` stays their number.
function withImages({ rows, ...patient }, group) {
  const place = ({ eye }) => EYE_ORDER[eye.toLowerCase()] ?? 2;
  const shown = [...group].sort((a, b) => place(a) - place(b)).map(({ result }) => result);
  return { ...patient, results: shown, named: Boolean(group[0].patient) };
}
