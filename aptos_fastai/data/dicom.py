"""Read who and what a DICOM image shows: patient key, eye, acquisition device, and the instance itself.

Names, birth dates and every other attribute of a person are never read.
"""
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from aptos_fastai.data.decode import DEFLATED, DICOM_HEADER, HEADER_BYTES, image_format

LATERALITY = {'L': 'left', 'R': 'right'}     # of an eye; B (both) and U (unpaired) name none
GROUPS = 'SharedFunctionalGroupsSequence', 'PerFrameFunctionalGroupsSequence'
TAGS = ['PatientID', 'IssuerOfPatientID', 'ImageLaterality', 'Laterality', 'Manufacturer', 'ManufacturerModelName',
        *GROUPS]
PATIENT, EYE, DEVICE = 'dicom:patient', 'dicom:eye', 'dicom:device'
TAGGED = {PATIENT, EYE, DEVICE}              # columns that a recipe may name


@dataclass(frozen=True)
class DicomTags:
    "What the tags of a DICOM image say; an empty text where they say nothing"
    patient: str = ''                        # Patient ID
    issuer: str = ''                         # Issuer of Patient ID: the same key of two issuers is two patients
    eye: str = ''                            # left or right
    device: str = ''                         # manufacturer and model of the camera


def is_dicom(file: Path) -> bool:
    "Return whether a file begins as a DICOM file does"
    try:
        with open(file, 'rb') as f: return image_format(f.read(HEADER_BYTES)) == 'DICOM'
    except OSError: return False


def read_tags(source: Path | bytes) -> DicomTags | None:
    """Return the tags of a DICOM file or of its bytes; None for another or an unreadable file, and without pydicom.

    Pixels are not read. A deflated file, which `decode` refuses, is not inflated.
    """
    try:
        import pydicom
    except ImportError: return None
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, 'rb') as f:
            header = f.read(DICOM_HEADER)
            if image_format(header[:HEADER_BYTES]) != 'DICOM' or DEFLATED in header: return None
            f.seek(0)
            with pydicom.config.disable_value_validation():                          # which would only warn
                return tags_of(pydicom.dcmread(f, stop_before_pixels=True, specific_tags=TAGS))
    except Exception: return None            # pydicom raises anything on damaged files; `decode` says what is wrong


def tags_of(ds: Any) -> DicomTags:
    "Return the tags of a dataset"
    device = ' '.join(dict.fromkeys(o for o in (_text(ds, 'Manufacturer'), _text(ds, 'ManufacturerModelName')) if o))
    return DicomTags(_text(ds, 'PatientID'), _text(ds, 'IssuerOfPatientID'), eye_of(ds), device)


def patient_keys(tags: Sequence[DicomTags | None]) -> list[str]:
    "Return the patient of each image, '' where there is none; if there are several issuers, the key names its issuer"
    named = [o or DicomTags() for o in tags]
    several = len({o.issuer for o in named if o.patient}) > 1
    return [f'{o.patient} ({o.issuer})' if several and o.patient and o.issuer else o.patient for o in named]


def with_tags(df: pd.DataFrame, paths: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    "Return the rows of a table with those of the columns `PATIENT`, `EYE` and `DEVICE` that `names` has"
    if not TAGGED & set(names): return df
    tags = [read_tags(Path(path)) for path in paths]
    columns = {PATIENT: patient_keys(tags), EYE: [o.eye if o else '' for o in tags],
               DEVICE: [o.device if o else '' for o in tags]}
    return df.assign(**{name: texts for name, texts in columns.items() if name in names})


def _text(ds: Any, name: str) -> str:
    "Return an attribute as text in one line; of several values the first"
    value = ds.get(name)
    if value is not None and not isinstance(value, str) and getattr(value, '__len__', None): value = value[0]
    return ' '.join(str(value or '').split())


def eye_of(ds: Any) -> str:
    """Return which eye an image shows: left, right, or empty where the tags name none or contradict each other.

    The eye is in Image Laterality, in Laterality (of the series), or in the Frame Laterality of functional groups.
    """
    found = {_text(ds, name).upper() for name in ('ImageLaterality', 'Laterality')}
    for group in (group for name in GROUPS for group in ds.get(name) or ()):
        found.update(_text(anatomy, 'FrameLaterality').upper() for anatomy in group.get('FrameAnatomySequence') or ())
    named = found - {''}
    return LATERALITY.get(named.pop(), '') if len(named) == 1 else ''
