"""Data in and out: NIfTI volumes, preprocessing, synthetic subjects and lesions, training sets. Knows no network."""
