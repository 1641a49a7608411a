"""Out-of-fold kappa of clusters of validation images: by camera, visual cluster, range of ids, and columns of tables.

A large difference between clusters warns that images from another clinic can be graded worse than the headline kappa
says. It replaces no test on another source: the networks were trained on images of every cluster.
"""
import numpy as np
import pandas as pd

from aptos_fastai.data.groups import natural_order
from aptos_fastai.data.store import read_square
from aptos_fastai.inference.subgroups import values_or_subgroups
from aptos_fastai.metrics import apply_thresholds, kappa_interval, quadratic_kappa, thresholds_or_midpoints
from aptos_fastai.recipe.sections import parse_thresholds
from aptos_fastai.run_folder import Run

MIN_IMAGES = 30                              # of a cluster; smaller ones are merged into OTHERS
OTHERS = 'others'
VISUAL_CLUSTERS = 5
ID_RANGES = 5                                # of each table
RADIUS_STEP = .1                             # of the retina's radius / image width, which differs between cameras
MAX_IMAGES = 5000                            # a random sample of more validation images
PERMUTATIONS = 200
TABLE, CAMERA, VISUAL, ID_RANGE = 'table', 'camera', 'visual cluster', 'id range'
MEANING = {
    TABLE: 'each graded table that validates',
    CAMERA: 'size of the original image, and radius of the retina / image width',
    VISUAL: f'k-means, k = {VISUAL_CLUSTERS}, of mean colour and contrast of the prepared images',
    ID_RANGE: f'{ID_RANGES} equal ranges of the ids of each table, in natural order',
}


def cluster_results(run: Run, valid: pd.DataFrame, setting: str) -> list[dict]:
    """Return the out-of-fold kappa by table, camera, visual cluster and range of ids: a dict for each of these kinds.

    `valid` (source, id_code, diagnosis, fold, group, score, grade, and columns that the tables carry, each with a kind
    of its own) are the validation images of one stage or ensemble, `setting` are its thresholds in the recipe. A random
    sample of `MAX_IMAGES` is used if there are more.
    """
    df = valid.sample(MAX_IMAGES, random_state=0) if len(valid) > MAX_IMAGES else valid
    df = with_image_records(run, df.sort_values(['source', 'id_code'])).reset_index(drop=True)
    labels = {TABLE: df.source.to_numpy(object)} if df.source.nunique() > 1 else {}
    labels |= {CAMERA: camera_labels(df), VISUAL: visual_labels(run, df), ID_RANGE: id_range_labels(df)}
    for column in run.recipe.carried:
        found = values_or_subgroups(df[column])
        if found.nunique() > 1: labels[column] = found.to_numpy(object)
    return [cluster_result(kind, df, label, setting) for kind, label in labels.items()]


def with_image_records(run: Run, valid: pd.DataFrame) -> pd.DataFrame:
    "Return `valid` with the path of each prepared image (`stored`) and width, height, r and stretch of prepared.csv"
    parts = []
    for name, rows in valid.groupby('source'):
        frame = run.frames[name]
        record = run.prepared_record(name)
        rows = rows.merge(frame[['id_code', 'stored']], on='id_code')
        parts.append(rows.merge(record[['id_code', 'width', 'height', 'r', 'stretch']], on='id_code'))
    return pd.concat(parts, ignore_index=True)


def camera_labels(df: pd.DataFrame) -> np.ndarray:
    "Return the kind of camera of each image: '4288 x 2848, radius 0.4'"
    width, height, radius, stretch = (df[column].astype(float) for column in ('width', 'height', 'r', 'stretch'))
    share = RADIUS_STEP * (radius * stretch.clip(upper=1) / width / RADIUS_STEP).round()
    values = zip(width, height, share, strict=True)
    return np.array([f'{w:.0f} x {h:.0f}, radius {s:.1f}' for w, h, s in values], object)


def visual_labels(run: Run, df: pd.DataFrame) -> np.ndarray:
    "Return the visual cluster of each image, named by its mean colour: '3: RGB 120 60 20, SD 40'"
    from sklearn.cluster import KMeans  # imported here because it takes a second
    features = np.empty((len(df), 6))
    for i, path in enumerate(df.stored):
        square = read_square(path, run.prep, 64).astype(float)
        features[i] = np.r_[square.mean((0, 1)), square.std((0, 1))]
    scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    k = min(VISUAL_CLUSTERS, len(np.unique(scaled, axis=0)))
    cluster = KMeans(k, n_init=10, random_state=0).fit_predict(scaled)
    brightness = np.array([features[cluster == c, :3].mean() for c in range(k)])
    names = {}
    for number, c in enumerate(np.argsort(brightness), 1):             # from dark to bright
        mean = features[cluster == c].mean(0)
        names[c] = f'{number}: RGB {mean[0]:.0f} {mean[1]:.0f} {mean[2]:.0f}, SD {mean[3:].mean():.0f}'
    return np.array([names[c] for c in cluster], object)


def id_range_labels(df: pd.DataFrame) -> np.ndarray:
    "Return the range of ids of each image: 'train: a1 to a99'"
    labels = np.empty(len(df), object)
    for name, ids in df.groupby('source').id_code:
        rows = ids.index.to_numpy()[natural_order(ids)]
        for block in np.array_split(rows, ID_RANGES):
            if len(block): labels[block] = f'{name}: {df.id_code[block[0]]} to {df.id_code[block[-1]]}'
    return labels


def cluster_result(kind: str, df: pd.DataFrame, labels: np.ndarray, setting: str) -> dict:
    """Return the clusters of one kind, largest first, and the drop of kappa between the easiest and the hardest.

    Clusters of fewer than `MIN_IMAGES` images are merged; the drop leaves them and clusters of one grade out.
    `drop_by_chance`: 95 % of random clusters of the same sizes have a smaller drop. It needs two clusters; else both
    are None.
    """
    counts = pd.Series(labels).value_counts()
    labels = np.where(pd.Series(labels).map(counts) < MIN_IMAGES, OTHERS, labels)
    order = sorted(set(labels), key=lambda o: (o == OTHERS, -(labels == o).sum(), o))
    clusters = [one_cluster(name, df, labels == name, setting) for name in order]
    compared = [o for o in clusters if o['name'] != OTHERS and o['grades'] > 1]
    drop = by_chance = None
    if len(compared) > 1:
        kappas = [o['kappa'] for o in compared]
        drop, by_chance = max(kappas) - min(kappas), drop_by_chance(df, [o['images'] for o in compared])
    meaning = MEANING.get(kind, 'a column of the table')
    return dict(kind=kind, meaning=meaning, clusters=clusters, drop=drop, drop_by_chance=by_chance)


def cluster_warnings(clusters: list[dict]) -> list[str]:
    "Return a warning for each kind of clusters whose drop is larger than by chance"
    return [f'kappa drops by {o["drop"]:.2f} between images that differ in {o["kind"]} (by chance up to '
            f'{o["drop_by_chance"]:.2f}): other cameras or clinics may be graded worse'
            for o in clusters if o['drop'] is not None and o['drop'] > o['drop_by_chance']]


def one_cluster(name: str, df: pd.DataFrame, inside: np.ndarray, setting: str) -> dict:
    """Return kappa, its interval and the mean error of one cluster.

    `kappa_others`: by thresholds that were fitted to the scores of the other clusters (leave one cluster out, for the
    thresholds only: the networks have trained on its other images). None for fixed thresholds or a single cluster.
    """
    rows, others = df[inside], df[~inside]
    several = rows.diagnosis.nunique() > 1
    left_out = None
    if several and len(others) and not parse_thresholds(setting):
        thresholds, _ = thresholds_or_midpoints(setting, others.score, others.diagnosis)
        left_out = quadratic_kappa(apply_thresholds(rows.score, thresholds), rows.diagnosis)
    return dict(name=str(name), images=len(rows), grades=int(rows.diagnosis.nunique()),
                kappa=quadratic_kappa(rows.grade, rows.diagnosis) if several else None,
                kappa_interval=kappa_interval(rows.grade, rows.diagnosis, rows.group) if several else None,
                kappa_others=left_out, mean_error=float((rows.score - rows.diagnosis).abs().mean()))


def drop_by_chance(df: pd.DataFrame, sizes: list[int]) -> float:
    "Return the 95 % quantile of the drop between clusters of the given sizes if patients are dealt to them at random"
    rng = np.random.default_rng(0)
    grades, truth = df.grade.to_numpy(int), df.diagnosis.to_numpy(int)
    _, group = np.unique(df.group.astype(str), return_inverse=True)
    drops = []
    for _ in range(PERMUTATIONS):
        shuffled = np.argsort(rng.permutation(group.max() + 1)[group], kind='stable')    # a patient's images together
        parts = np.split(shuffled[:sum(sizes)], np.cumsum(sizes)[:-1])
        kappas = [quadratic_kappa(grades[part], truth[part]) for part in parts]
        drops.append(np.nanmax(kappas) - np.nanmin(kappas) if np.isfinite(kappas).any() else 0.)
    return float(np.quantile(drops, .95))
