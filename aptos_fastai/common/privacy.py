"What a file holds of patients, in one line when it is written; docs/privacy.md lists all of them."
from pathlib import Path

LEAVE_OUT = ' (--deidentify leaves them out)'


def patient_data(file: str | Path, holds: str, remedy: str = '') -> str:
    "Return the line that says what `file` holds of patients: 'grades.csv: names files; treat as patient data'"
    return f'{file}: {holds}; treat as patient data{remedy}'
